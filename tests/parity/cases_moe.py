"""Families whose feed-forward is of experts."""

from functools import partial

from .peer import SIZES
from .peer import Case as AnyCase

# Their grouped products in bfloat16 need widths in multiples of 8.
Case = partial(AnyCase, sizes={**SIZES, "intermediate_size": 16})

YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0}
PHI_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.5, 4.0, 7.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 32,
}

CASES = {
    "mixtral: grouped, head width apart": Case(
        "mixtral",
        {"num_key_value_heads": 1, "head_dim": 6, "num_local_experts": 5, "rope_theta": 50.0},
    ),
    "mixtral: window, three a token": Case(
        "mixtral",
        {
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "router_jitter_noise": 0.1,
        },
    ),
    "qwen2_moe: dense layers between": Case(
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen2_moe: windows, renormalised": Case(
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "qkv_bias": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 8,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe: yarn, layer types": Case(
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 16,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3_moe: grouped, head width apart": Case(
        "qwen3_moe",
        {
            "num_key_value_heads": 1,
            "head_dim": 10,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "mlp_only_layers": [1],
            "rope_scaling": {**YARN, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3_moe: windows, biases, renormalised": Case(
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe: grouped": Case(
        "olmoe", {"num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 3}
    ),
    "olmoe: cut, biases, renormalised": Case(
        "olmoe",
        {
            "clip_qkv": 0.7,
            "attention_bias": True,
            "norm_topk_prob": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe: multipliers": Case(
        "granitemoe",
        {
            "num_key_value_heads": 1,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe: biases": Case(
        "granitemoe",
        {"attention_bias": True, "num_local_experts": 4, "attention_multiplier": 0.35},
    ),
    "phimoe: biases": Case(
        "phimoe",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "lm_head_bias": True,
            "num_local_experts": 5,
            "router_jitter_noise": 0.3,
        },
    ),
    "phimoe: longrope, window": Case(
        "phimoe",
        {
            "sliding_window": 7,
            "num_local_experts": 4,
            "rope_theta": 50.0,
            "rope_scaling": PHI_ROPE,
            "original_max_position_embeddings": 32,
            "input_jitter_noise": 0.1,
        },
    ),
    "phimoe: longrope, amplitude by length": Case(
        "phimoe",
        {
            "num_local_experts": 4,
            "tie_word_embeddings": True,
            # With equal factors: there the long ones are never used (see families/phimoe.py).
            "rope_parameters": {
                **PHI_ROPE,
                "rope_type": "longrope",
                "rope_theta": 50.0,
                "long_factor": PHI_ROPE["short_factor"],
                "original_max_position_embeddings": 10,
            },
        },
        batched=False,
    ),
}

"""Models with latent attention or with experts that few others are like."""

from .peer import SIZES, Case

LATENT = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
}
V3 = {**SIZES, **LATENT, "n_group": 4, "topk_group": 2}
V2 = {**SIZES, **LATENT}
OSS = {
    **SIZES,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
LLAMA4 = {
    **SIZES,
    "head_dim": 8,
    "intermediate_size": 16,
    "intermediate_size_mlp": 20,
    "num_local_experts": 4,
    "attention_chunk_size": 7,
    "no_rope_layer_interval": 2,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 16,
}

CASES = {
    "deepseek_v3: groups, two kinds of layers": Case("deepseek_v3", sizes=V3),
    "deepseek_v3: no rank of queries, halves turn, weights as they are": Case(
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
        },
        sizes=V3,
    ),
    "deepseek_v3: yarn as it was published, biases": Case(
        "deepseek_v3",
        {"rope_scaling": YARN, "rope_theta": 100.0, "attention_bias": True, "rms_norm_eps": 0.01},
        sizes=V3,
    ),
    "deepseek_v2: greedy, no rank of queries": Case(
        "deepseek_v2", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, sizes=V2
    ),
    "deepseek_v2: groups, yarn, biases, all layers": Case(
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 100.0},
            "mlp_bias": True,
            "attention_bias": True,
            "first_k_dense_replace": 0,
        },
        sizes=V2,
    ),
    "gpt_oss: windows, yarn as it was published": Case(
        "gpt_oss",
        {
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "swiglu_limit": 0.5,
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
        sizes=OSS,
    ),
    "gpt_oss: nothing said of the rotation, no biases, tied": Case(
        "gpt_oss",
        {
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
        sizes=OSS,
    ),
    "gpt_oss: plain rotation": Case(
        "gpt_oss",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}, "sliding_window": 128},
        sizes=OSS,
    ),
    "llama4_text: chunks, layers that do not turn, experts everywhere": Case(
        "llama4_text", {"num_key_value_heads": 1, "num_experts_per_tok": 2}, sizes=LLAMA4
    ),
    "llama4_text: late queries are longer, every second layer has experts": Case(
        "llama4_text",
        {
            "floor_scale": 4,
            "attn_scale": 0.7,
            "interleave_moe_layer_step": 2,
            "attention_bias": True,
            "no_rope_layers": [0, 1, 1],
        },
        sizes=LLAMA4,
        batched=False,  # they count the padding as positions
    ),
    "llama4_text: no norm of queries, scaled, tied": Case(
        "llama4_text",
        {
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "tie_word_embeddings": True,
            "moe_layers": [0],
            "layer_types": ["full_attention", "chunked_attention", "chunked_attention"],
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 16,
            },
            "rope_theta": 50.0,
        },
        sizes=LLAMA4,
    ),
}

"""Gemma 1 to 3."""

from .peer import SIZES, Case

VISION = {
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CASES = {
    "gemma: one kv head": Case(
        "gemma", {"head_dim": 10, "num_key_value_heads": 1, "rope_theta": 50.0}
    ),
    "gemma: biases, untied, and gelu means its tanh form": Case(
        "gemma",
        {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
        },
    ),
    "gemma2: windows and caps": Case(
        "gemma2",
        {
            "head_dim": 8,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2: no caps": Case(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma3: one in three is full, as version 4 says": Case(
        "gemma3_text",
        {
            "head_dim": 10,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 5,
            "rope_theta": 300.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "gemma3: nested rotations, caps, biases, untied": Case(
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 200.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3: text beside images": Case(
        "gemma3",
        {
            "text_config": {
                **SIZES,
                "head_dim": 10,
                "num_key_value_heads": 1,
                "sliding_window": 5,
                "sliding_window_pattern": 3,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
        sizes={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
}

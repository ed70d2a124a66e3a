"""Gemma 4: each of its sizes has parts that others lack.

Nothing scales its scores but the norm of queries. With weights of size 1 there the two attentions
of transformers itself differ by 2e-5 in logits, and by 3e-3 in gradients.
"""

from functools import partial
from typing import Any

from .peer import SIZES
from .peer import Case as AnyCase

Case = partial(AnyCase, q_norm=0.2)

G4: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 5,
    "intermediate_size": 16,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "vocab_size_per_layer_input": 53,
    "hidden_size_per_layer_input": 0,
}
ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 20.0,
        "factor": 2.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
# What is added last is normed, however small: a tiny eps makes noise of it.
TOKEN_INPUT = {"hidden_size_per_layer_input": 6, "rms_norm_eps": 0.01}
SAME = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

CASES = {
    "gemma4_text: as E2B, a vector per layer, shared keys, wide layers": Case(
        "gemma4_text",
        {
            **TOKEN_INPUT,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
            "rope_parameters": ROPES,
        },
        sizes=G4,
    ),
    "gemma4_text: as 31B, keys are values": Case(
        "gemma4_text",
        {**SAME, "rope_parameters": ROPES, "final_logit_softcapping": 3.0},
        sizes=G4,
    ),
    "gemma4_text: as 26B-A4B, experts beside": Case(
        "gemma4_text", {**SAME, **EXPERTS, "rope_parameters": ROPES}, sizes=G4
    ),
    "gemma4_text: all at once, biases, untied, the rotations unsaid": Case(
        "gemma4_text",
        {
            **TOKEN_INPUT,
            **SAME,
            **EXPERTS,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "hidden_activation": "silu",
        },
        sizes=G4,
    ),
    "gemma4_text: a vector per layer, every sixth layer is full": Case(
        "gemma4_text",
        {
            **TOKEN_INPUT,
            "num_hidden_layers": 7,
            "layer_types": None,
            "num_key_value_heads": 1,
        },
        sizes=G4,
    ),
    "gemma4: beside images": Case(
        "gemma4",
        {
            "text_config": {
                **G4,
                **TOKEN_INPUT,
                "num_kv_shared_layers": 2,
                "rope_parameters": ROPES,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": VISION,
        },
        sizes={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
}

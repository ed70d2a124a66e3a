"""OLMo 1 to 3, and what else norms after its layers or turns neighbours: GLM-4, EXAONE 4."""

from typing import Any

from .peer import Case

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]

CASES = {
    "olmo: clipped": Case("olmo", {"clip_qkv": 0.4, "num_key_value_heads": 1}),
    "olmo: tied, biases, linear": Case(
        "olmo",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_theta": 50.0,
        },
    ),
    "olmo2: grouped": Case("olmo2", {"num_key_value_heads": 1, "rope_theta": 300.0}),
    "olmo2: tied, biases, yarn": Case(
        "olmo2",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rms_norm_eps": 0.1,
            "rope_parameters": {**YARN, "rope_theta": 100.0},
        },
    ),
    "olmo3: yarn on full layers, as version 4 says": Case(
        "olmo3",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "rope_scaling": {**YARN, "attention_factor": 1.2},
            "rope_theta": 500_000.0,  # theirs forgets another one on sliding layers
        },
        matrix=0.1,  # each side is up to 0.8 of the tolerance from float64 at 0.15
    ),
    "olmo3: nested rotations": Case(
        "olmo3",
        {
            "sliding_window": 7,
            "layer_types": KINDS,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "glm: half of each head turns": Case(
        "glm",
        {
            "head_dim": 12,
            "num_key_value_heads": 1,
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "glm: whole heads, no biases, tied": Case(
        "glm",
        {
            "head_dim": 8,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "glm4: norms around": Case("glm4", {"head_dim": 12, "num_key_value_heads": 1}),
    "glm4: yarn, no biases": Case(
        "glm4",
        {
            "head_dim": 16,
            "attention_bias": False,
            "rope_parameters": {**YARN, "rope_theta": 50.0},
        },
    ),
    "exaone4: only windows turn": Case(
        "exaone4",
        {
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_scaling": LLAMA3,
            "rope_theta": 300.0,
        },
    ),
    "exaone4: no windows, all turn": Case(
        "exaone4",
        {
            "head_dim": 10,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {**LLAMA3, "rope_theta": 300.0},
        },
    ),
    "exaone4: listed windows, no turn between": Case(
        "exaone4", {"sliding_window": 7, "sliding_window_pattern": "GLG", "layer_types": KINDS}
    ),
}

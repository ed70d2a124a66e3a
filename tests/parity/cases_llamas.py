"""Mistral, Qwen, Phi-3 and other dense relatives of Llama."""

from .peer import Case

YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "mistral: window": Case(
        "mistral",
        {"sliding_window": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mistral: wide heads": Case(
        "mistral", {"sliding_window": None, "head_dim": 10, "rope_theta": 100.0}
    ),
    "ministral: alternating windows": Case(
        "ministral",
        {
            "head_dim": 6,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "ministral: windows": Case("ministral", {"head_dim": 8, "sliding_window": 5}),
    "qwen2: grouped": Case("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2: last layers slide": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen2: layer types, yarn": Case(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **YARN},
        },
    ),
    "qwen2: yarn of version 4": Case(
        "qwen2",
        {
            "sliding_window": 6,  # not in use
            "rope_scaling": {"type": "yarn", **YARN},
            "rope_theta": 100.0,
        },
    ),
    "qwen3: wide heads": Case("qwen3", {"head_dim": 10, "num_key_value_heads": 1}),
    "qwen3: biases, windows": Case(
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3: yarn of version 4": Case(
        "qwen3",
        {"head_dim": 16, "rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 100.0},
    ),
}

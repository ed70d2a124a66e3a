"""Mistral, Qwen, Phi-3 and other dense relatives of Llama."""

from .peer import Case

YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.3, 2.0, 3.0], "long_factor": [1.5, 2.0, 5.0, 9.0]}
ORIGINAL = {"original_max_position_embeddings": 16}  # so that the 24 tokens pass it

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
    "ministral3: hotter queries": Case(
        "ministral3",
        {
            "head_dim": 10,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.4,
                "factor": 9.0,
                "original_max_position_embeddings": 7,
            },
        },
    ),
    "ministral3: window": Case(
        "ministral3",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "rope_parameters": {
                "type": "default",
                "original_max_position_embeddings": 7,
                "llama_4_scaling_beta": 0,
            },
        },
    ),
    "phi3: grouped": Case(
        "phi3", {"num_key_value_heads": 1, "sliding_window": 5, "rope_theta": 100.0}
    ),
    "phi3: longrope": Case(
        "phi3", {"rope_parameters": {"type": "longrope", **LONG}, **ORIGINAL}, batched=False
    ),
    "phi3: su, some channels": Case(
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_theta": 100.0,
            "rope_scaling": {
                "type": "su",
                **ORIGINAL,  # without it transformers 5.23 reads no "su"
                **{key: values[:2] for key, values in LONG.items()},
            },
            "tie_word_embeddings": True,
            **ORIGINAL,
        },
        batched=False,
    ),
    "phi3: longrope called yarn, amplified": Case(
        "phi3",
        {
            "rope_scaling": {"type": "yarn", "factor": 30.0, **LONG},
            "head_dim": 8,
            **ORIGINAL,
        },
        batched=False,
    ),
    "smollm3: unturned layers slide": Case(
        "smollm3",
        {
            "num_key_value_heads": 1,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "smollm3: biases, layer lists": Case(
        "smollm3",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "no_rope_layers": [0, 1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **YARN},
        },
    ),
    "granite: multipliers": Case(
        "granite",
        {
            "num_key_value_heads": 1,
            "embedding_multiplier": 3.3,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.7,
            "tie_word_embeddings": True,
        },
    ),
    "granite: biases": Case(
        "granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}
    ),
    "seed_oss: its biases": Case("seed_oss", {"head_dim": 10, "num_key_value_heads": 1}),
    "seed_oss: other biases": Case(
        "seed_oss",
        {
            "head_dim": 8,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "arcee: grouped": Case("arcee", {"num_key_value_heads": 1, "head_dim": 10}),
    "arcee: biases, yarn": Case(
        "arcee",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "yarn", "mscale": 1.0, **YARN},
            "rope_theta": 100.0,
        },
    ),
}

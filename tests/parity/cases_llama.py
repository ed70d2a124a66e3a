"""Llama and its nearest relatives."""

from .peer import Case

CASES = {
    "llama: grouped": Case("llama", {"num_key_value_heads": 1}),
    "llama: dynamic": Case(
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0},
        },
        batched=False,
    ),
}

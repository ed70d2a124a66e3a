"""GPT-NeoX, StarCoder 1 and 2, Phi, GPT-J, StableLM, OPT."""

from .peer import SIZES, Case

# Without grouped heads: a key that these families lack.
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

CASES = {
    "gpt_neox: parallel": Case("gpt_neox", {"tie_word_embeddings": True}, sizes=PLAIN),
    "gpt_neox: in sequence, whole heads": Case(
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": 50,
            "hidden_act": "gelu_fast",
            "layer_norm_eps": 0.3,
        },
        sizes=PLAIN,
    ),
    "gpt_neox: linear": Case(
        "gpt_neox",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.5,
            }
        },
        sizes=PLAIN,
    ),
    "gpt_neox: dynamic": Case(
        "gpt_neox",
        {
            "max_position_embeddings": 16,
            "rotary_pct": 0.5,
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        },
        sizes=PLAIN,
        batched=False,
    ),
}

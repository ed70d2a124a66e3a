"""Gemma 1 to 3."""

from .peer import Case

CASES = {
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
}

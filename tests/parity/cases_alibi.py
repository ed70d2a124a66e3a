"""Families with ALiBi, and the others whose layers read one LayerNorm or square their ReLU."""

from .peer import Case, V

BLOOM = {
    "vocab_size": V,
    "hidden_size": 24,
    "n_layer": 3,
    "n_head": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FALCON = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MPT = {
    "vocab_size": V,
    "d_model": 24,
    "n_layers": 3,
    "n_heads": 3,
    "max_seq_len": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CASES = {
    "bloom: heads no power of two": Case("bloom", sizes=BLOOM, padding=("attention_mask",)),
    "bloom: residual of the norm": Case(
        "bloom",
        {
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
            "layer_norm_epsilon": 0.1,
            "tie_word_embeddings": False,
        },
        sizes=BLOOM,
        padding=("attention_mask",),
    ),
    "falcon: one kv head": Case("falcon", {"layer_norm_epsilon": 0.1}, sizes=FALCON),
    "falcon: groups under two norms": Case(
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "ffn_hidden_size": 20,
            "tie_word_embeddings": False,
        },
        sizes=FALCON,
    ),
    "falcon: groups under one norm": Case(
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 1,
            "num_ln_in_parallel_attn": 1,
            "bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
        },
        sizes=FALCON,
    ),
    "falcon: a kv head for each": Case(
        "falcon", {"multi_query": False, "activation": "relu"}, sizes=FALCON
    ),
    # Slopes, and their products with positions, that bfloat16 does not hold.
    "falcon: alibi": Case(
        "falcon",
        {
            "num_attention_heads": 12,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        sizes=FALCON,
        attn="sdpa",  # eager adds ALiBi twice
    ),
    "mpt: heads no power of two": Case("mpt", sizes=MPT, padding=("attention_mask",)),
    "mpt: clipped": Case(
        "mpt",
        {
            "n_heads": 4,
            "layer_norm_epsilon": 0.1,
            "tie_word_embeddings": False,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.7},
        },
        sizes=MPT,
        padding=("attention_mask",),
    ),
    "cohere: defaults": Case("cohere", {"logit_scale": 1.5, "layer_norm_eps": 0.1}),
    "cohere: norms of each head": Case(
        "cohere",
        {
            "logit_scale": 1.0,
            "use_qk_norm": True,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_theta": 50.0,
        },
    ),
    "cohere: head width apart": Case(
        "cohere",
        {
            "logit_scale": 1.0,
            "head_dim": 10,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
        },
    ),
    "cohere2: windows by pattern": Case(
        "cohere2",
        {
            "logit_scale": 1.0,
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "num_key_value_heads": 1,
            "rope_theta": 50.0,
        },
    ),
    "cohere2: windows by layer": Case(
        "cohere2",
        {
            "logit_scale": 1.0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 7,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    # Quieter: at 0.15 their own float32 is 1e-5 from their float64, for squares double its noise.
    "nemotron: defaults": Case("nemotron", {"num_key_value_heads": 1, "norm_eps": 0.1}, matrix=0.1),
    "nemotron: biases and rotated share": Case(
        "nemotron",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "rope_theta": 50.0,
            "partial_rotary_factor": 1 / 3,
            "tie_word_embeddings": True,
        },
        matrix=0.1,
    ),
    "nemotron: rotated share in version 5": Case(
        "nemotron",
        {
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.25,
            },
        },
        matrix=0.1,
    ),
}

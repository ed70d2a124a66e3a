"""GPT-NeoX, StarCoder 1 and 2, Phi, GPT-J, StableLM, OPT."""

from .peer import SIZES, Case

# Without grouped heads: a key that these families lack.
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
# The same under GPT-2's names.
GPT = {
    "vocab_size": PLAIN["vocab_size"],
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Its feed-forward's width has a name of its own.
OPT = {key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {"ffn_dim": 20}

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
    "starcoder2: grouped, window": Case(
        "starcoder2", {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 5}
    ),
    "starcoder2: no biases, untied": Case(
        "starcoder2",
        {
            "use_bias": False,
            "tie_word_embeddings": False,
            "norm_epsilon": 0.3,
            "rope_theta": 50.0,
        },
    ),
    "starcoder2: yarn": Case(
        "starcoder2",
        {
            "sliding_window": 7,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0},
        },
    ),
    "phi: half of each head": Case("phi", {"layer_norm_eps": 0.3, "rope_theta": 50.0}),
    "phi: normalised queries and keys": Case(
        "phi", {"num_key_value_heads": 1, "qk_layernorm": True, "partial_rotary_factor": 0.25}
    ),
    "phi: linear, wide heads": Case(
        "phi",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi: dynamic": Case(
        "phi",
        {
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "rope_theta": 50.0,
        },
        batched=False,
    ),
    "gptj: part of each head": Case("gptj", {"rotary_dim": 4, "n_inner": 20}, sizes=GPT),
    "gptj: whole heads": Case(
        "gptj",
        {"rotary_dim": 8, "activation_function": "relu", "layer_norm_epsilon": 0.3},
        sizes=GPT,
    ),
    "stablelm: in sequence": Case(
        "stablelm", {"use_qkv_bias": True, "tie_word_embeddings": True, "rope_theta": 50.0}
    ),
    "stablelm: parallel, normalised heads": Case(
        "stablelm",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "layer_norm_eps": 0.3,
            "hidden_act": "gelu",
            "partial_rotary_factor": 0.5,
        },
    ),
    "stablelm: linear": Case(
        "stablelm",
        {
            "qk_layernorm": True,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 50.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "opt: norms before": Case("opt", {}, sizes=OPT),
    "opt: norms after, narrow embedding": Case(
        "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, sizes=OPT
    ),
    "opt: no biases, bare norms, untied": Case(
        "opt",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "word_embed_proj_dim": 16,
        },
        sizes=OPT,
    ),
    "opt: no last norm": Case("opt", {"_remove_final_layer_norm": True}, sizes=OPT),
    "gpt_bigcode: one head of keys": Case("gpt_bigcode", {"n_inner": 20}, sizes=GPT),
    "gpt_bigcode: keys for each head": Case(
        "gpt_bigcode",
        {
            "multi_query": False,
            "activation_function": "gelu",
            "layer_norm_epsilon": 0.3,
            "tie_word_embeddings": False,
        },
        sizes=GPT,
    ),
    "gpt_bigcode: unscaled": Case(
        "gpt_bigcode", {"scale_attn_weights": False, "multi_query": True}, sizes=GPT
    ),
}

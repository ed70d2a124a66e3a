"""What is measured: the same numbers for us and for the peer. Both sides read it."""

from typing import Any

# The 13.8 M-parameter Llama of shared/PEERS.md.
TRAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
BATCH, LENGTH = 8, 512

# What is read: random weights, as speed does not depend on them. config.json's own keys.
MODELS: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B
    "tinyllama": {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    # Mixtral at a quarter of its width: 8 experts, 2 per token
    "mixtral": {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "rope_theta": 1e6,
    },
    # Gemma 2 at half of 2B's width: soft caps, norms on both sides, a window on every other layer
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "hidden_size": 1152,
        "intermediate_size": 4608,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "vocab_size": 64000,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}
# Of llama2.c, with positions for rows of 1024 tokens. Their parameters: 15.2 M and 109.5 M.
for _name, _width, _inner, _layers in (("15m", 288, 768, 6), ("110m", 768, 2048, 12)):
    MODELS[f"llama-{_name}"] = MODELS["tinyllama"] | {
        "hidden_size": _width,
        "intermediate_size": _inner,
        "num_hidden_layers": _layers,
        "num_attention_heads": _layers,
        "num_key_value_heads": _layers,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }
# llama-15m cut down, for losses that are compared step by step.
MODELS["llama-small"] = MODELS["llama-15m"] | {"vocab_size": 8192, "num_hidden_layers": 3}
MODELS["tinyllama-4"] = MODELS["tinyllama"] | {"num_hidden_layers": 4}
DECODE_PROMPT, PREFILL_PROMPT = 128, 512
LEARNING_RATE, MAX_NORM = 1e-4, 1.0
# A device map as transformers takes it: every layer on disk.
OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
OFFLOAD_PROMPT = 8

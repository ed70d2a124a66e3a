"""config.json files of published models with experts, whole, as they are on the hub."""

from typing import Any

import pytest

from ardor.arch.spec import Attention, Decoder, Experts, LongScaling, Mlp, QKNorm, Rope
from ardor.errors import ConfigError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig

# Keys that all of these files have.
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "output_router_logits": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
}
MIXTRAL = {  # mistralai/Mixtral-8x7B-v0.1
    **COMMON,
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_MOE = {  # Qwen/Qwen1.5-MoE-A2.7B
    **COMMON,
    "architectures": ["Qwen2MoeForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
QWEN3_MOE = {  # Qwen/Qwen3-30B-A3B
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMOE = {  # allenai/OLMoE-1B-7B-0924
    **COMMON,
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
GRANITE_MOE = {  # ibm-granite/granite-3.0-1b-a400m-base
    **COMMON,
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "vocab_size": 49155,
}
PHIMOE = {  # microsoft/Phi-3.5-MoE-instruct; the factors stand for its 64 measured ones
    **COMMON,
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "auto_map": {
        "AutoConfig": "configuration_phimoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0199 + i for i in range(64)],
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + i / 50 for i in range(64)],
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}


def read(config: dict[str, Any]) -> Decoder:
    return family_of(config).spec(HFConfig(config, path="config.json"))


def parts(spec: Decoder) -> tuple[Attention, Experts]:
    mixer, ffn = spec.layers[-1].mixer, spec.layers[-1].ffn
    assert isinstance(mixer, Attention) and isinstance(ffn, Experts)
    return mixer, ffn


def test_mixtral():
    spec = read(MIXTRAL)
    mixer, ffn = parts(spec)
    assert (mixer.kv_heads, mixer.head_width, mixer.window) == (8, 128, None)
    assert mixer.rope == Rope(theta=1e6, rotated=128)
    assert (ffn.count, ffn.expert.width, ffn.router.renormalise) == (8, 14336, True)
    assert (spec.balance, len(spec.layers)) == (0.02, 32)


def test_qwen2_moe():
    spec = read(QWEN2_MOE)
    mixer, ffn = parts(spec)
    assert (mixer.qkv_bias, mixer.out_bias, mixer.window) == (True, False, None)
    assert (ffn.count, ffn.router.per_token, ffn.router.renormalise) == (60, 4, False)
    assert (ffn.expert.width, ffn.shared_gated, len({*spec.layers})) == (1408, True, 1)
    assert ffn.shared == Mlp(width=5632, act="silu")


def test_qwen3_moe():
    spec = read(QWEN3_MOE)
    mixer, ffn = parts(spec)
    assert mixer.qk_norm == QKNorm(norm=spec.layers[0].norm)
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (32, 4, 128)
    assert (ffn.count, ffn.router.per_token, ffn.router.renormalise) == (128, 8, True)
    assert (ffn.expert.width, ffn.shared, len({*spec.layers})) == (768, None, 1)


def test_olmoe():
    mixer, ffn = parts(read(OLMOE))
    assert mixer.qk_norm is not None and mixer.qk_norm.over == "width" and mixer.clip is None
    assert (ffn.count, ffn.expert.width, ffn.router.renormalise) == (64, 1024, False)


def test_granitemoe():
    spec = read(GRANITE_MOE)
    mixer, ffn = parts(spec)
    assert (mixer.scale, spec.embed_scale, spec.logit_scale) == (1 / 64, 12.0, 1 / 6)
    assert (spec.layers[0].residual_scale, spec.tied, spec.balance) == (0.22, True, 0.0)
    assert (ffn.count, ffn.router.score, ffn.router.per_token) == (32, "chosen", 8)


def test_phimoe():
    spec = read(PHIMOE)
    mixer, ffn = parts(spec)
    assert (mixer.qkv_bias, mixer.out_bias, spec.head_bias) == (True, True, True)
    assert mixer.rope is not None and isinstance(mixer.rope.scaling, LongScaling)
    assert mixer.rope.scaling.original_positions == 4096
    assert mixer.rope.scaling.long_amplitude == 1.243163121016122
    assert (spec.layers[0].norm.kind, spec.layers[0].norm.bias) == ("layer", True)
    assert (ffn.router.score, ffn.router.jitter) == ("sparsemixer", 0.01)


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (MIXTRAL, {"num_experts": 4}, "'num_local_experts': 8, 'num_experts': 4} disagree"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 of only 8 experts"),
        (QWEN2_MOE, {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is false"),
        (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers=3 is not a list"),
        (PHIMOE, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not implemented"),
        (PHIMOE, {"tie_word_embeddings": True}, "a tied head has no bias"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config, keys, message):
    with pytest.raises(ConfigError, match=message):
        read({**config, **keys})

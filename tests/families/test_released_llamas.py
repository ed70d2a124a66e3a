"""Files of the hub are read whole: the keys that they carry, at their real sizes."""

import math
import re
from typing import Any

import pytest

from ardor.arch.spec import LongScaling, QKNorm, Rope, Temperature, YarnScaling
from ardor.errors import ConfigError

from .test_families import MISTRAL, QWEN2, read

MISTRAL_7B: dict[str, Any] = {  # mistralai/Mistral-7B-v0.1
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
NEMO = {  # mistralai/Mistral-Nemo-Instruct-2407
    **MISTRAL_7B,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 1024000,
    "num_hidden_layers": 40,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
QWEN2_5: dict[str, Any] = {  # Qwen/Qwen2.5-0.5B-Instruct
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_4B = {  # Qwen/Qwen3-4B
    **QWEN2_5,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}

PHI3_128K: dict[str, Any] = {  # microsoft/Phi-3-mini-128k-instruct
    "_name_or_path": "Phi-3-mini-128k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [9.0] * 48, "short_factor": [1.05] * 48, "type": "su"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
PHI4_MINI = {  # microsoft/Phi-4-mini-instruct
    **PHI3_128K,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
PHI4 = {  # microsoft/phi-4
    **PHI3_128K,
    "auto_map": None,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}
SMOLLM3: dict[str, Any] = {  # HuggingFaceTB/SmolLM3-3B
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
GRANITE: dict[str, Any] = {  # ibm-granite/granite-3.1-8b-instruct
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.0078125,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12800,
    "logits_scaling": 16.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 49155,
}
SEED_OSS: dict[str, Any] = {  # ByteDance-Seed/Seed-OSS-36B-Instruct
    "architectures": ["SeedOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.1,
    "attention_out_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 524288,
    "mlp_bias": False,
    "model_type": "seed_oss",
    "num_attention_heads": 80,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 1,
    "residual_dropout": 0.1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"rope_type": "default"},
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0",
    "use_cache": True,
    "vocab_size": 155136,
}
AFM = {  # arcee-ai/AFM-4.5B
    **MISTRAL_7B,
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": 20,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 20.0,
        "mscale": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "vocab_size": 128004,
}
MINISTRAL3: dict[str, Any] = {  # the language model of mistralai/Ministral-3-8B-Base-2512
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 131072,
}


def test_mistral():
    spec = read(MISTRAL_7B)
    mixers = {layer.mixer for layer in spec.layers}
    assert [(m.window, m.head_width, m.kv_heads) for m in mixers] == [(4096, 128, 8)]
    nemo = read(NEMO)
    assert {layer.mixer.window for layer in nemo.layers} == {None}
    assert nemo.layers[0].mixer.rope == Rope(theta=1e6, rotated=128)
    assert (nemo.width, nemo.layers[0].mixer.heads, nemo.tied) == (5120, 32, False)


def test_a_mistral_without_a_window_key_has_the_default_one():
    assert read(MISTRAL).layers[0].mixer.window == 4096


def test_a_mistral_whose_layers_have_types_slides_where_they_say():
    kinds = ["full_attention", "sliding_attention"]
    spec = read(MISTRAL, layer_types=kinds, sliding_window=4)
    assert [layer.mixer.window for layer in spec.layers] == [None, 4]


def test_a_null_asks_for_a_head_each_and_not_for_the_default():
    spec = read(MISTRAL, num_key_value_heads=None)
    assert spec.layers[0].mixer.kv_heads == 3


def test_qwen2():
    spec = read(QWEN2_5)
    mixer = spec.layers[-1].mixer
    assert (mixer.qkv_bias, mixer.out_bias, mixer.window, spec.tied) == (True, False, None, True)
    assert mixer.rope == Rope(theta=1e6, rotated=64)
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, Qwen/CodeQwen1.5-7B, Qwen/Qwen2.5-7B-Instruct-1M
    read(QWEN2_5, use_mrope=False)
    read(QWEN2_5, rotary_emb_base=1000000, seq_length=65536)
    read(QWEN2_5, dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192})


def test_qwen3():
    spec = read(QWEN3_4B)
    mixer = spec.layers[0].mixer
    assert mixer.qk_norm == QKNorm(norm=spec.norm)
    assert (mixer.head_width, mixer.qkv_bias, mixer.window) == (128, False, None)
    silent = {key: value for key, value in QWEN3_4B.items() if key != "head_dim"}
    assert read(silent).layers[0].mixer.head_width == 128  # not 2560 / 32


def test_phi3():
    mixer = read(PHI3_128K).layers[0].mixer
    assert mixer.rope is not None and isinstance(mixer.rope.scaling, LongScaling)
    assert (mixer.rope.scaling.original_positions, mixer.rope.rotated) == (4096, 96)
    amplitude = math.sqrt(1 + math.log(32) / math.log(4096))
    assert mixer.rope.scaling.long_amplitude == amplitude == mixer.rope.scaling.short_amplitude
    assert mixer.window == 262144
    renamed = PHI3_128K["rope_scaling"] | {"type": "longrope"}
    assert read(PHI3_128K, rope_scaling=renamed) == read(PHI3_128K)

    mini = read(PHI4_MINI)
    assert (mini.layers[0].mixer.rope.rotated, mini.tied) == (96, True)
    assert (mini.layers[0].mixer.head_width, mini.layers[0].mixer.kv_heads) == (128, 8)
    assert read(PHI4).layers[0].mixer.rope == Rope(theta=250000.0, rotated=128)


def test_the_context_that_a_phi3_was_first_trained_on_is_4096_unless_the_outer_key_says_otherwise():
    silent = {k: v for k, v in PHI3_128K.items() if k != "original_max_position_embeddings"}
    assert read(silent) == read(PHI3_128K)


def test_smollm3():
    spec = read(SMOLLM3)
    turning = [layer.mixer.rope is not None for layer in spec.layers]
    assert turning == [True, True, True, False] * 9
    assert spec.layers[0].mixer.rope == Rope(theta=5e6, rotated=128)
    assert spec.tied and {layer.mixer.window for layer in spec.layers} == {None}


def test_granite():
    spec = read(GRANITE)
    layer = spec.layers[0]
    assert (layer.mixer.scale, layer.residual_scale) == (0.0078125, 0.22)
    assert (spec.embed_scale, spec.logit_scale, spec.tied) == (12.0, 1 / 16, True)


def test_seed_oss():
    mixer = read(SEED_OSS).layers[0].mixer
    assert (mixer.heads, mixer.head_width, mixer.qkv_bias, mixer.out_bias) == (80, 128, True, False)
    assert mixer.rope == Rope(theta=1e7, rotated=128)


def test_arcee():
    layer = read(AFM).layers[0]
    assert (layer.ffn.act, layer.ffn.gated) == ("relu2", False)
    assert layer.mixer.rope is not None and isinstance(layer.mixer.rope.scaling, YarnScaling)
    assert layer.mixer.rope.scaling.attention_factor == 0.1 * math.log(20) + 1


def test_ministral3():
    spec = read(MINISTRAL3)
    mixer = spec.layers[0].mixer
    assert mixer.temperature == Temperature(slope=0.1, span=16384)
    assert mixer.rope is not None and isinstance(mixer.rope.scaling, YarnScaling)
    assert mixer.rope.scaling.attention_factor == 1.0
    silent = {k: v for k, v in MINISTRAL3.items() if k != "rope_parameters"}
    assert read(silent) == spec  # as transformers fills in
    cool = MINISTRAL3["rope_parameters"] | {"llama_4_scaling_beta": 0}
    assert read(MINISTRAL3, rope_parameters=cool).layers[0].mixer.temperature is None


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (QWEN2, {"use_mrope": True}, "use_mrope=True is not implemented"),
        (QWEN2, {"rope_theta": 2.0, "rotary_emb_base": 3}, "rotary_emb_base=3"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "no window is in use"),
        (PHI3_128K, {"mlp_bias": True}, "mlp_bias=True is not implemented"),
        (PHI3_128K, {"full_attn_mod": 2}, "full_attn_mod=2 is not implemented"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] is not a list of 36"),
        (QWEN2, {"auto_map": {"AutoModel": "code.Model"}}, "Python code"),
        (MISTRAL, {"attention_bias": True}, "nothing reads attention_bias=True"),
    ],
)
def test_a_value_that_we_cannot_honour_is_refused_by_name(base, keys, says):
    read(base)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(base, **keys)

"""Files of the hub are read whole: the keys that they carry, at their real sizes."""

import re
from typing import Any

import pytest

from ardor.arch.spec import QKNorm, Rope
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


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (QWEN2, {"use_mrope": True}, "use_mrope=True is not implemented"),
        (QWEN2, {"rope_theta": 2.0, "rotary_emb_base": 3}, "rotary_emb_base=3"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "no window is in use"),
        (MISTRAL, {"attention_bias": True}, "nothing reads attention_bias=True"),
    ],
)
def test_a_value_that_we_cannot_honour_is_refused_by_name(base, keys, says):
    read(base)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(base, **keys)

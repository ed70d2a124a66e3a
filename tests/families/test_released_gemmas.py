"""Published config.json files of Gemma, OLMo, GLM and EXAONE are read whole, and as meant.

Their keys and numbers are written down here from memory of the hub, not fetched.
"""

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from ardor.arch.spec import (
    Attention,
    Decoder,
    LinearScaling,
    Llama3Scaling,
    Mlp,
    Rope,
    YarnScaling,
)
from ardor.errors import ConfigError
from ardor.families import family_of

from .test_families import read

GEMMA: dict[str, Any] = {  # google/gemma-2b, as first published
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_11 = {  # google/gemma-1.1-2b-it
    **GEMMA,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA2: dict[str, Any] = {  # google/gemma-2-27b
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
    "_attn_implementation": "eager",
}
GEMMA3_1B: dict[str, Any] = {  # google/gemma-3-1b-it
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA3_270M = {  # google/gemma-3-270m, by a later version
    **{k: v for k, v in GEMMA3_1B.items() if k != "sliding_window_pattern"},
    "_sliding_window_pattern": 6,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_hidden_layers": 18,
    "use_bidirectional_attention": False,
}
GEMMA3_27B = {  # the text_config of google/gemma-3-27b-it, as its text-only copies have it
    **GEMMA3_1B,
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}
GEMMA3_4B: dict[str, Any] = {  # google/gemma-3-4b-it: what it leaves out are the defaults
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
OLMO: dict[str, Any] = {  # allenai/OLMo-7B-0424-hf
    "model_type": "olmo",
    "architectures": ["OlmoForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": 8.0,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": 50304,
}
OLMO_1B = {  # allenai/OLMo-1B-hf
    **OLMO,
    "clip_qkv": None,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
OLMO2: dict[str, Any] = {  # allenai/OLMo-2-0325-32B
    **{k: v for k, v in OLMO.items() if k != "clip_qkv"},
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 100277,
    "eos_token_id": 100257,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "vocab_size": 100352,
}
OLMO3: dict[str, Any] = {  # allenai/Olmo-3-1025-7B
    **{k: v for k, v in OLMO2.items() if k != "torch_dtype"},
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "transformers_version": "4.57.0",
    "vocab_size": 100278,
}
GLM: dict[str, Any] = {  # THUDM/glm-4-9b-chat-hf
    "model_type": "glm",
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 151552,
}
GLM4 = {  # THUDM/GLM-4-32B-0414, and the scaling that its card gives for longer texts
    **GLM,
    "model_type": "glm4",
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": False,
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "max_position_embeddings": 32768,
    "num_attention_heads": 48,
    "num_hidden_layers": 61,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}
EXAONE4: dict[str, Any] = {  # LGAI-EXAONE/EXAONE-4.0-32B
    "model_type": "exaone4",
    "architectures": ["Exaone4ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27392,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    "max_position_embeddings": 131072,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "vocab_size": 102400,
}
EXAONE4_SMALL = {  # LGAI-EXAONE/EXAONE-4.0-1.2B
    **EXAONE4,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "layer_types": ["full_attention"] * 30,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "sliding_window": None,
    "sliding_window_pattern": None,
    "tie_word_embeddings": True,
}
RELEASED = {
    "gemma": GEMMA,
    "gemma 1.1": GEMMA_11,
    "gemma2": GEMMA2,
    "gemma3 1b": GEMMA3_1B,
    "gemma3 270m": GEMMA3_270M,
    "gemma3 27b": GEMMA3_27B,
    "gemma3 4b": GEMMA3_4B,
    "olmo": OLMO,
    "olmo 1b": OLMO_1B,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "glm": GLM,
    "glm4": GLM4,
    "exaone4": EXAONE4,
    "exaone4 small": EXAONE4_SMALL,
}


def mixer(spec: Decoder, layer: int) -> Attention:
    found = spec.layers[layer].mixer
    assert isinstance(found, Attention)
    return found


@pytest.mark.parametrize("config", RELEASED.values(), ids=RELEASED)
def test_a_published_config_means_what_transformers_makes_of_it(config):
    """They rewrite an old file in the new form; both must be read alike."""
    rewritten = AutoConfig.for_model(**config).to_dict()
    assert "rope_theta" not in rewritten
    assert read(rewritten) == read(config)


def test_the_first_gemma_has_one_kv_head_and_the_tanh_form_of_gelu():
    spec = read(GEMMA)
    assert (mixer(spec, 0).kv_heads, mixer(spec, 0).scale) == (1, 1 / 16)
    ffn, norm = spec.layers[0].ffn, spec.norm
    assert isinstance(ffn, Mlp) and ffn.act == "gelu_tanh"
    assert norm is not None and (norm.weight, norm.late_cast) == ("one_plus", True)
    assert (spec.tied, spec.embed_scale) == (True, 2048**0.5)
    assert read(GEMMA_11) == spec


def test_gemma_2_scales_by_its_scalar_and_slides_on_even_layers():
    spec = read(GEMMA2)
    assert (mixer(spec, 0).scale, mixer(spec, 0).softcap, spec.logit_softcap) == (1 / 12, 50, 30)
    assert [mixer(spec, i).window for i in range(3)] == [4096, None, 4096]


def test_gemma_3_turns_full_layers_slower():
    spec = read(GEMMA3_27B)
    rope = Rope(theta=1e4, rotated=128)
    full = replace(rope, theta=1e6, scaling=LinearScaling(factor=8.0))
    for i in range(62):
        is_full = i % 6 == 5
        assert mixer(spec, i).rope == (full if is_full else rope)
        assert mixer(spec, i).window == (None if is_full else 1024)
    assert mixer(spec, 0).scale == 168**-0.5
    assert mixer(read(GEMMA3_270M), 5).rope == Rope(theta=1e6, rotated=256)


def test_gemma_3_beside_images_is_the_text_model_of_the_same_size():
    spec = read(GEMMA3_4B)
    assert (spec.vocab, spec.width, len(spec.layers), spec.tied) == (262_208, 2560, 34, True)
    found = mixer(spec, 5)
    assert (found.heads, found.kv_heads, found.head_width, found.scale) == (8, 4, 256, 1 / 16)
    assert found.rope == Rope(theta=1e6, rotated=256, scaling=LinearScaling(factor=8.0))
    # An adapter names the modules that transformers builds, not the tensors of the file.
    linears = family_of(GEMMA3_4B).disk_linears(spec)
    assert linears["layers.5.mixer.q_proj"].name == "model.language_model.layers.5.self_attn.q_proj"


def test_olmos_norms_and_rotations_are_those_of_their_papers():
    spec = read(OLMO)
    assert spec.norm is not None and (spec.norm.weight, spec.norm.eps) == ("none", 1e-5)
    assert (mixer(spec, 0).clip, spec.tied) == (8.0, False)
    assert (mixer(read(OLMO_1B), 0).clip, read(OLMO_1B).tied) == (None, True)

    qk_norm = mixer(read(OLMO2), 0).qk_norm
    assert qk_norm is not None and qk_norm.over == "width" and qk_norm.norm.late_cast
    assert read(OLMO2).layers[0].placement == "post"

    spec = read(OLMO3)
    yarn = YarnScaling(factor=8.0, original_positions=8192, attention_factor=1.2079441541679836)
    assert mixer(spec, 2).rope == Rope(theta=5e5, rotated=128)
    assert mixer(spec, 3).rope == Rope(theta=5e5, rotated=128, scaling=yarn)
    assert [mixer(spec, i).window for i in range(4)] == [4096, 4096, 4096, None]


def test_theta_is_of_all_layers_of_an_old_olmo_3_file():
    spec = read(OLMO3, rope_theta=1e4)
    ropes = [mixer(spec, i).rope for i in (0, 3)]
    assert [rope and rope.theta for rope in ropes] == [1e4, 1e4]


def test_glm_turns_half_of_each_head_in_neighbours():
    rope = Rope(theta=1e4, rotated=64, pairing="neighbours")
    assert mixer(read(GLM), 0).rope == rope
    assert mixer(read(GLM), 0).qkv_bias and not mixer(read(GLM), 0).out_bias
    scaled = mixer(read(GLM4), 0).rope
    assert scaled is not None and isinstance(scaled.scaling, YarnScaling)
    assert replace(scaled, scaling=None) == rope
    assert [read(c).layers[0].placement for c in (GLM, GLM4)] == ["pre", "sandwich"]


def test_exaone_4_turns_windows_only_unless_it_has_none():
    spec = read(EXAONE4)
    rope = mixer(spec, 0).rope
    assert rope is not None and isinstance(rope.scaling, Llama3Scaling)
    assert [mixer(spec, i).rope for i in (1, 2, 3)] == [rope, rope, None]
    assert [mixer(spec, i).window for i in (2, 3)] == [4096, None]
    small = read(EXAONE4_SMALL)
    assert all(mixer(small, i).rope is not None for i in range(30)) and small.tied


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA, {"hidden_activation": "relu"}, "hidden_activation='relu' is not implemented"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "never reads what follows it"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        (GEMMA3_1B, {"sliding_window": None}, "sliding_attention, but no window is in use"),
        (GEMMA3_4B, {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        (GEMMA3_4B, {"text_config": {"clip": 8}}, "json, text_config: nothing reads clip=8"),
        (OLMO3, {"layer_types": ["full_attention"]}, "not a list of 32 kinds"),
        (OLMO3, {"rope_parameters": {"rope_type": "yarn"}}, "nothing reads rope_type='yarn'"),
        (
            OLMO3,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "but rope_parameters gives",
        ),
        (GLM, {"head_dim": 126}, "63 channels, which cannot be turned in pairs"),
        (EXAONE4, {"layer_types": None}, "sliding_window_pattern='LLLG'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(base, keys, says):
    with pytest.raises(ConfigError, match=says):
        read(base, **keys)

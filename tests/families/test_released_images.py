"""The config.json files of published models that also read images; written down from memory."""

from typing import Any

import pytest
from transformers import AutoConfig

from ardor.arch.spec import Attention, Experts, Rope
from ardor.errors import ConfigError
from ardor.families import family_of

from .test_families import read

PIXTRAL = {
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 1540,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "pixtral",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "rope_theta": 10000.0,
}
MISTRAL_SMALL_31: dict[str, Any] = {  # mistralai/Mistral-Small-3.1-24B-Instruct-2503
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": PIXTRAL,
    "vision_feature_layer": -1,
}
MINISTRAL3_3B: dict[str, Any] = {  # mistralai/Ministral-3-3B-Instruct-2512-BF16
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
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
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.0.0.dev0",
    "vision_config": PIXTRAL,
    "vision_feature_layer": -1,
}
SCOUT: dict[str, Any] = {  # meta-llama/Llama-4-Scout-17B-16E-Instruct
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        "_attn_implementation_autoset": True,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0",
    "vision_config": {
        "_attn_implementation_autoset": True,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}
QWEN25_VL_3B: dict[str, Any] = {  # Qwen/Qwen2.5-VL-3B-Instruct: one level for texts and images
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
QWEN2_VL_7B: dict[str, Any] = {  # Qwen/Qwen2-VL-7B-Instruct
    **{key: value for key, value in QWEN25_VL_3B.items() if key != "vision_config"},
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "vocab_size": 152064,
}
QWEN3_VL_4B: dict[str, Any] = {  # Qwen/Qwen3-VL-4B-Instruct
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
RELEASED = {
    "ministral 3 3b": MINISTRAL3_3B,
    "llama 4 scout": SCOUT,
    "qwen2.5-vl 3b": QWEN25_VL_3B,
    "qwen2-vl 7b": QWEN2_VL_7B,
    "qwen3-vl 4b": QWEN3_VL_4B,
}


@pytest.mark.parametrize("config", RELEASED.values(), ids=RELEASED)
def test_a_published_config_means_what_transformers_makes_of_it(config):
    """They rewrite an old file in the new form; both must be read alike."""
    assert read(AutoConfig.for_model(**config).to_dict()) == read(config)


def test_mistral_small_has_a_head_of_its_own():
    """Its file is silent. Transformers 5 would tie it, and does not because the files hold one."""
    spec = read(MISTRAL_SMALL_31)
    assert (spec.tied, spec.width, len(spec.layers)) == (False, 5120, 40)
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope == Rope(theta=1e9, rotated=128)


def test_qwens_channels_turn_as_if_positions_were_one_number():
    for config, theta in ((QWEN25_VL_3B, 1e6), (QWEN3_VL_4B, 5e6)):
        mixer = read(config).layers[0].mixer
        assert isinstance(mixer, Attention) and mixer.rope == Rope(theta=theta, rotated=128)
    assert (read(QWEN25_VL_3B).tied, read(QWEN2_VL_7B).tied) == (True, False)


def test_scout_is_the_text_model_by_itself():
    spec = read(SCOUT)
    assert spec == read({**SCOUT["text_config"]}) and isinstance(spec.layers[0].ffn, Experts)


@pytest.mark.parametrize("config", [*RELEASED.values(), MISTRAL_SMALL_31])
def test_adapters_name_the_modules_that_transformers_builds(config):
    linears = family_of(config).disk_linears(read(config))
    place = "language_model.model." if config is SCOUT else "model.language_model."
    assert linears["layers.3.mixer.q_proj"].name == f"{place}layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (MISTRAL_SMALL_31, {"text_config": {"model_type": "mamba"}}, "expected mistral | minis"),
        (SCOUT, {"text_config": {"clip": 8}}, "text_config: .*no 'num_attention_heads'"),
        (SCOUT, {"sounds": 3}, "nothing reads sounds=3"),
        (QWEN25_VL_3B, {"sounds": 3}, "nothing reads sounds=3"),
        (QWEN3_VL_4B, {"use_mrope": True}, "nothing reads use_mrope=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(base, keys, says):
    with pytest.raises(ConfigError, match=says):
        read(base, **keys)

"""The config.json files of published models are read whole."""

import math
from typing import Any

import pytest

from ardor.arch.spec import (
    Attention,
    Experts,
    LatentAttention,
    Mlp,
    Norm,
    QKNorm,
    Rope,
    Temperature,
    YarnScaling,
)
from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig
from ardor.families.packing import FP8, read_fp8

from .test_families import read

DEEPSEEK_CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
V3: dict[str, Any] = {  # deepseek-ai/DeepSeek-V3, without its quantization
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": DEEPSEEK_CODE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = {  # moonshotai/Moonlight-16B-A3B
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": DEEPSEEK_CODE,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
V2_LITE: dict[str, Any] = {  # deepseek-ai/DeepSeek-V2-Lite
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2: dict[str, Any] = {  # what DeepSeek-V2 has otherwise
    **V2_LITE,
    "ep_size": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def test_deepseek_v3():
    spec = read(V3)
    dense, routed = spec.layers[2], spec.layers[3]
    mixer = dense.mixer
    assert len(spec.layers) == 61 and isinstance(mixer, LatentAttention)
    assert isinstance(dense.ffn, Mlp) and isinstance(routed.ffn, Experts)
    assert (mixer.query_rank, mixer.kv_rank, mixer.rope.rotated) == (1536, 512, 64)
    assert mixer.rope.pairing == "neighbours"
    assert isinstance(mixer.rope.scaling, YarnScaling)
    assert mixer.rope.scaling.attention_factor == 1.0  # the scale has it instead, squared
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    router = routed.ffn.router
    assert (router.score, router.group_score, router.correction) == ("sigmoid", "top2", True)
    assert (router.groups, router.kept_groups, router.per_token) == (8, 4, 8)
    assert (router.renormalise, router.scale) == (True, 2.5)
    assert routed.ffn.shared == Mlp(width=2048, act="silu")


def test_moonlight():
    spec = read(MOONLIGHT)
    mixer, ffn = spec.layers[1].mixer, spec.layers[1].ffn
    assert isinstance(mixer, LatentAttention) and isinstance(ffn, Experts)
    assert mixer.query_rank is None and mixer.rope.scaling is None
    assert mixer.scale == 192**-0.5
    assert (spec.layers[1].norm.eps, mixer.norm.eps) == (1e-5, 1e-6)
    assert ffn.shared is not None and ffn.shared.width == 2816


def test_deepseek_v2_and_its_lite_form():
    lite, full = (read(config).layers[-1] for config in (V2_LITE, V2))
    assert isinstance(lite.ffn, Experts) and isinstance(full.ffn, Experts)
    assert isinstance(lite.mixer, LatentAttention) and lite.mixer.query_rank is None
    assert lite.mixer.scale == pytest.approx(192**-0.5 * (0.0707 * 3.6888794541139363 + 1) ** 2)
    assert (lite.ffn.router.score, lite.ffn.router.groups) == ("softmax", 1)
    router = full.ffn.router
    assert (router.groups, router.kept_groups, router.group_score) == (8, 3, "max")
    assert (router.renormalise, router.scale) == (False, 16.0)


FP8_FILES = {
    # deepseek-ai/DeepSeek-V3, and the "scale_fmt" that version 3.1 has beside
    "deepseek v3": (
        V3,
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        (128, 128),
    ),
    "qwen3 8b fp8": (  # Qwen/Qwen3-8B-FP8
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 9}
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
        {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        (128, 128),
    ),
    "ministral 3": (  # mistralai/Ministral-3-8B-Instruct-2512, its text model
        {"model_type": "ministral3", "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 34, "num_attention_heads": 32, "vocab_size": 131072},
        {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector"],
            "quant_method": "fp8",
            "weight_block_size": None,
        },
        None,
    ),
}


@pytest.mark.parametrize(("base", "section", "block"), FP8_FILES.values(), ids=FP8_FILES)
def test_weights_in_eight_bits_are_those_of_the_same_decoder(base, section, block):
    config = {**base, "quantization_config": section}
    assert read(config) == read(base)
    assert read_fp8(HFConfig(config, path="config.json")) == FP8(block)
    assert read_fp8(HFConfig(base, path="config.json")) is None


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (V3, {"quantization_config": {"quant_method": "hqq"}}, "quantization_config=.*hqq"),
        (V3, {"auto_map": {"AutoModel": "modeling_else.Model"}}, "auto_map=.*never run"),
        (V3, {"auto_map": {"AutoModel": "me/else--modeling_kimi.Model"}}, "auto_map=.*never run"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (V3, {"topk_method": "greedy"}, "topk_method='greedy'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads=8"),
        (V3, {"topk_group": 9}, "8 of n_routed_experts=256 cannot be chosen within topk_group=9"),
        (V3, {"n_group": 256}, "cannot be chosen within topk_group=4 of n_group=256"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (V2, {"rope_interleave": False}, "rope_interleave=False"),
        (V2, {"n_group": 7}, "n_group=7"),
    ],
)
def test_what_deepseek_files_cannot_say_here_is_named(config, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(config, **keys)


GPT_OSS: dict[str, Any] = {  # openai/gpt-oss-20b
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def test_gpt_oss():
    spec = read(GPT_OSS)
    mixers = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, Attention) for mixer in mixers)
    assert [mixer.window for mixer in mixers] == [128, None] * 12
    assert mixers[0].sinks and mixers[0].qkv_bias and mixers[0].out_bias
    assert mixers[0].rope == Rope(
        theta=150000.0,
        rotated=64,
        scaling=YarnScaling(
            factor=32.0,
            original_positions=4096,
            truncate=False,
            attention_factor=0.1 * math.log(32) + 1,
        ),
    )
    ffn = spec.layers[0].ffn
    assert isinstance(ffn, Experts)
    assert (ffn.count, ffn.router.per_token, ffn.router.score) == (32, 4, "chosen")
    assert (ffn.expert.limit, ffn.expert.shift, ffn.expert.act) == (7.0, 1.0, "quick_gelu")
    # Said or not, the rotation is the published one.
    assert read({**GPT_OSS, "rope_scaling": None}) == spec


def test_what_gpt_oss_files_cannot_say_here_is_named():
    with pytest.raises(ConfigError, match=r"swiglu_alpha=1\.5"):
        read(GPT_OSS, swiglu_alpha=1.5)
    with pytest.raises(ConfigError, match=r"quantization_config: nothing reads bits=4"):
        read(GPT_OSS, quantization_config={"quant_method": "mxfp4", "bits": 4})


LLAMA4: dict[str, Any] = {  # the text_config of meta-llama/Llama-4-Scout-17B-16E
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "cache_implementation": "hybrid",
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
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
}


def test_llama4():
    spec = read(LLAMA4)
    mixers = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, Attention) for mixer in mixers)
    assert [mixer.rope is not None for mixer in mixers] == [True, True, True, False] * 12
    assert [mixer.chunk for mixer in mixers] == [8192, 8192, 8192, None] * 12
    assert mixers[0].qk_norm == QKNorm(norm=Norm(eps=1e-5, weight="none"), after_rope=True)
    assert mixers[0].rope.pairing == "neighbours" and mixers[0].temperature is None
    assert mixers[3].temperature == Temperature(slope=0.1, span=8192, first=1)
    assert mixers[3].qk_norm is None
    ffn = spec.layers[0].ffn
    assert isinstance(ffn, Experts) and ffn.router.scales_input
    assert (ffn.count, ffn.router.per_token, ffn.shared) == (16, 1, Mlp(width=8192, act="silu"))


def test_llama4_layers_that_differ_are_those_that_the_file_names():
    other = read(
        LLAMA4, interleave_moe_layer_step=2, num_hidden_layers=4, no_rope_layers=[0, 1] * 2
    )
    assert [isinstance(layer.ffn, Experts) for layer in other.layers] == [False, True] * 2
    assert [layer.mixer.chunk for layer in other.layers] == [None, 8192] * 2
    assert other.layers[0].ffn == Mlp(width=16384, act="silu")
    with pytest.raises(ConfigError, match=r"no_rope_layers=\[1\] is not a list of 48 0s and 1s"):
        read(LLAMA4, no_rope_layers=[1])

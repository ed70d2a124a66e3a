"""Config files as they were released, of the families in `parity/cases_classic`."""

from typing import Any

import pytest
from transformers import AutoConfig

from ardor.arch.spec import Norm, QKNorm, Rope
from ardor.errors import ConfigError

from .test_families import family_of, read

PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_20B = {
    **PYTHIA,
    "attention_probs_dropout_prob": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "transformers_version": "4.19.0.dev0",
    "vocab_size": 50432,
}
STARCODER2_3B = {
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True,
    "bos_token_id": 0,
    "embedding_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3072,
    "initializer_range": 0.018042,
    "intermediate_size": 12288,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "num_attention_heads": 24,
    "num_hidden_layers": 30,
    "num_key_value_heads": 2,
    "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0.dev0",
    "use_bias": True,
    "use_cache": True,
    "vocab_size": 49152,
}
PHI_2 = {
    "_name_or_path": "microsoft/phi-2",
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": 51200,
}
GPTJ_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {
        "text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}
    },
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 50400,
}
STABLELM_3B = {
    "architectures": ["StableLmForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "model_type": "stablelm",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0",
    "use_cache": True,
    "use_qkv_bias": False,
    "vocab_size": 50304,
}
STABLELM_2_12B = {
    **STABLELM_3B,
    "attention_dropout": 0.0,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_dropout": 0.0,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "qk_layernorm": True,
    "use_parallel_residual": True,
    "vocab_size": 100352,
}
OPT_125M = {
    "_name_or_path": "facebook/opt-125m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
OPT_350M = {
    **{key: value for key, value in OPT_125M.items() if key != "_remove_final_layer_norm"},
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
}
STARCODER = {
    "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "inference_runner": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
RELEASED: dict[str, dict[str, Any]] = {
    "Pythia 1.4B": PYTHIA,
    "Pythia, saved by 4.46": {
        **PYTHIA,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.1,
        "hidden_dropout": 0.0,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_theta": 10000,
    },
    "GPT-NeoX 20B": NEOX_20B,
    "RedPajama-INCITE 3B": {
        **PYTHIA,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "vocab_size": 50432,
    },
    "Dolly 2 12B": {
        **PYTHIA,
        "custom_pipelines": {
            "text-generation": {
                "impl": "instruct_pipeline.InstructionTextGenerationPipeline",
                "pt": "AutoModelForCausalLM",
                "tf": "TFAutoModelForCausalLM",
            }
        },
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_attention_heads": 40,
        "num_hidden_layers": 36,
    },
    "StarCoder2 3B": STARCODER2_3B,
    "Phi 2": PHI_2,
    "Phi 1.5": {
        **PHI_2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_key_value_heads": None,
        "partial_rotary_factor": 0.5,
        "resid_pdrop": 0.0,
    },
    "GPT-J 6B": GPTJ_6B,
    "StableLM 3B 4E1T": STABLELM_3B,
    "StableLM 2 1.6B": {
        **STABLELM_3B,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "use_qkv_bias": True,
        "vocab_size": 100352,
    },
    "StableLM 2 12B": STABLELM_2_12B,
    "OPT 125M": OPT_125M,
    "OPT 350M": OPT_350M,
    "Galactica 125M": {
        **OPT_125M,
        "activation_function": "gelu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "learned_embeddings": True,
        "scale_embeddings": False,
        "vocab_size": 50000,
    },
    "StarCoder": STARCODER,
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_says_what_transformers_reads_in_it(name):
    raw = RELEASED[name]
    theirs = AutoConfig.for_model(**raw).to_dict()
    assert read(raw) == read(theirs)


def test_gpt_neox_as_released():
    mixer, layer = read(NEOX_20B).layers[0].mixer, read(NEOX_20B).layers[0]
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (64, 64, 96)
    assert (mixer.rope.rotated, mixer.rope.theta) == (24, 10_000.0)
    assert (mixer.qkv_bias, mixer.out_bias, layer.ffn.bias) == (True, True, True)
    assert (layer.placement, layer.ffn.act, layer.ffn.gated) == ("parallel_two", "gelu_tanh", False)
    redpajama = read(RELEASED["RedPajama-INCITE 3B"]).layers[0]
    assert (redpajama.placement, redpajama.mixer.rope.rotated) == ("pre", 80)


def test_starcoder2_as_released():
    spec = read(STARCODER2_3B)
    mixers = {layer.mixer for layer in spec.layers}
    assert {(m.heads, m.kv_heads, m.head_width, m.window) for m in mixers} == {(24, 2, 128, 4096)}
    assert (spec.tied, spec.layers[0].ffn.gated, spec.norm.kind) == (True, False, "layer")
    assert spec.layers[0].mixer.rope.theta == 999999.4420358813


def test_phi_as_released():
    spec = read(PHI_2)
    mixer, layer = spec.layers[0].mixer, spec.layers[0]
    assert (mixer.head_width, mixer.rope.rotated, mixer.qk_norm) == (80, 32, None)
    assert (layer.placement, layer.ffn.act, layer.ffn.gated) == ("parallel", "gelu_tanh", False)
    assert (spec.head_bias, mixer.qkv_bias, mixer.out_bias, layer.ffn.bias) == (True,) * 4
    assert read(RELEASED["Phi 1.5"]).layers[0].mixer.rope.rotated == 32


def test_gptj_as_released():
    spec = read(GPTJ_6B)
    mixer, layer = spec.layers[0].mixer, spec.layers[0]
    assert mixer.rope == Rope(theta=10_000.0, rotated=64, pairing="neighbours")
    assert (mixer.head_width, mixer.qkv_bias, mixer.out_bias) == (256, False, False)
    assert (layer.ffn.width, layer.ffn.bias, layer.placement) == (16384, True, "parallel")
    assert (spec.head_bias, spec.tied, spec.max_positions) == (True, False, 2048)


def test_stablelm_as_released():
    mixer, layer = read(STABLELM_3B).layers[0].mixer, read(STABLELM_3B).layers[0]
    assert (layer.placement, mixer.rope.rotated, mixer.qk_norm) == ("pre", 20, None)
    large = read(STABLELM_2_12B)
    mixer, layer = large.layers[0].mixer, large.layers[0]
    assert (mixer.heads, mixer.kv_heads, mixer.rope.rotated) == (32, 8, 40)
    assert mixer.qk_norm == QKNorm(norm=Norm(kind="layer", eps=1e-5), over="heads")
    assert (layer.placement, large.norm.bias, mixer.qkv_bias) == ("parallel", True, False)
    names = {name for rule in family_of(STABLELM_2_12B).rules(large).plain for name in rule.names}
    assert "model.layers.39.self_attn.q_layernorm.norms.31.weight" in names


def test_opt_as_released():
    small, narrow = read(OPT_125M), read(OPT_350M)
    assert (small.position_offset, small.max_positions, small.embed_width) == (2, 2048, None)
    assert (small.layers[0].placement, small.norm) == ("pre", small.layers[0].norm)
    assert (narrow.layers[0].placement, narrow.norm) == ("after", None)
    assert (narrow.embed_width, narrow.width, narrow.tied) == (512, 1024, True)
    assert (small.layers[0].ffn.act, small.layers[0].mixer.rope) == ("relu", None)


def test_starcoder_as_released():
    spec = read(STARCODER)
    mixer, layer = spec.layers[0].mixer, spec.layers[0]
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (48, 1, 128)
    assert (layer.ffn.width, layer.ffn.act, layer.placement) == (24576, "gelu", "pre")
    assert (spec.tied, spec.learned_positions, spec.position_offset) == (True, True, 0)


@pytest.mark.parametrize(
    "raw", [OPT_125M, OPT_350M, GPTJ_6B, PYTHIA, STARCODER], ids=lambda raw: raw["model_type"]
)
@pytest.mark.sweep
def test_the_first_files_hold_masks_and_may_lack_the_prefix(raw):
    rules = family_of(raw).rules(read(raw))
    masks = {"gptj": "h.0.attn.masked_bias", "gpt_neox": "layers.0.attention.bias"}
    names = [name.removeprefix(rules.prefix) for rule in rules.plain for name in rule.names]
    held = [*names, *filter(None, [masks.get(raw["model_type"])])]
    rules.bind(held).check(held, "model.safetensors")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("Pythia 1.4B", "num_key_value_heads", 4),
        ("Pythia 1.4B", "head_dim", 64),
        ("Pythia 1.4B", "rope_theta", 5e5),
        ("Pythia 1.4B", "partial_rotary_factor", 0.5),
        ("StarCoder2 3B", "mlp_type", "gated"),
        ("StarCoder2 3B", "norm_type", "rms_norm"),
        ("Phi 2", "tie_word_embeddings", True),
        ("GPT-J 6B", "tie_word_embeddings", True),
        ("GPT-J 6B", "rotary", False),
        ("StableLM 3B 4E1T", "head_dim", 64),
        ("OPT 125M", "learned_embeddings", False),
        ("OPT 125M", "scale_embeddings", True),
        ("StarCoder", "num_key_value_heads", 2),
    ],
)
def test_what_the_family_does_not_do_is_refused(name, key, value):
    with pytest.raises(ConfigError, match=f"{key}={value!r} is not implemented"):
        read(RELEASED[name], **{key: value})


@pytest.mark.parametrize("rotated", [63, 512])
def test_gptj_refuses_channels_that_have_no_pair(rotated):
    with pytest.raises(ConfigError, match=f"rotary_dim={rotated} of heads of width 256"):
        read(GPTJ_6B, rotary_dim=rotated)

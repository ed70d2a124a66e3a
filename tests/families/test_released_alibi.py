"""The config.json of published BLOOM, Falcon, MPT, Command R and Nemotron models, whole."""

import re
from typing import Any

import pytest

from ardor.arch.spec import Attention, Decoder, Mlp, Rope
from ardor.errors import ConfigError

from .test_families import read


def parts(spec: Decoder, index: int = 0) -> tuple[Attention, Mlp]:
    layer = spec.layers[index]
    assert isinstance(layer.mixer, Attention) and isinstance(layer.ffn, Mlp)
    return layer.mixer, layer.ffn


BLOOM: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 14336,
    "n_inner": None,
    "n_layer": 70,
    "num_attention_heads": 112,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.21.0",
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
CODE = {
    "AutoConfig": "configuration_falcon.FalconConfig",
    "AutoModelForCausalLM": "tiiuae/falcon-40b--modeling_falcon.FalconForCausalLM",
}
FALCON_7B: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": CODE,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_11B = {
    **FALCON_7B,
    "activation": "gelu",
    "ff_factor": 4,
    "ffn_hidden_size": 16384,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "num_ln_in_parallel_attn": 1,
    "rope_scaling": None,
    "rope_theta": 500042.0,
    "tie_word_embeddings": False,
}
FALCON_RW = {
    **FALCON_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_kv_heads": 32,
    "parallel_attn": False,
    "vocab_size": 50304,
}
# The 40B as first published; the old code has one form only, and no flag for it.
REFINED_WEB: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "RefinedWeb",
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
}
STORYWRITER: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 6,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"emb_init_std": None, "init_std": 0.02, "name": "kaiming_normal_"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 65536,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
COMMAND_R: dict[str, Any] = {
    "architectures": ["CohereForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 22528,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "model_type": "cohere",
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rope_theta": 8000000.0,
    "torch_dtype": "float16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 256000,
}
COMMAND_R_PLUS = {
    **COMMAND_R,
    "hidden_size": 12288,
    "intermediate_size": 33792,
    "logit_scale": 0.8333333333333334,
    "num_attention_heads": 96,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rope_theta": 75000000.0,
    "tokenizer_class": "CohereTokenizer",
    "use_qk_norm": True,
}
COMMAND_R7B: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 8192,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "vocab_size": 256000,
}
MINITRON: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 4096,
    "initializer_range": 0.0134,
    "intermediate_size": 16384,
    "kv_channels": 128,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def test_bloom():
    spec = read(BLOOM)
    mixer, ffn = parts(spec)
    assert (spec.width, len(spec.layers), spec.tied) == (14336, 70, True)
    assert spec.embed_norm == spec.norm and not spec.layers[0].residual_normed
    assert (mixer.heads, mixer.head_width, ffn.width) == (112, 128, 57344)
    assert mixer.alibi is not None and mixer.rope is None and not mixer.alibi_coarse
    assert mixer.alibi[0] == 2**-0.125 and mixer.alibi[64] == 2**-0.0625


def test_falcon_7b_has_one_kv_head_whatever_it_counts():
    spec = read(FALCON_7B)
    mixer, ffn = parts(spec)
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (71, 1, 64)
    assert mixer.rope == Rope(theta=10_000.0, rotated=64) and mixer.alibi is None
    assert (spec.layers[0].placement, spec.tied, ffn.width) == ("parallel", True, 18176)


def test_falcon_40b_in_its_old_form_is_the_new_one():
    old = read(REFINED_WEB)
    mixer, _ = parts(old)
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (128, 8, 64)
    assert (old.layers[0].placement, len(old.layers)) == ("parallel_two", 60)
    keys = {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60}
    new = {**FALCON_7B, **keys, "new_decoder_architecture": True, "num_kv_heads": 8}
    assert read(new) == old


def test_falcon_7b_in_its_old_form_is_the_new_one():
    old = {key: value for key, value in REFINED_WEB.items() if key != "n_head_kv"}
    keys = {"model_type": "RefinedWebModel", "multi_query": True, "n_head": 71, "n_layer": 32}
    assert read({**old, **keys, "hidden_size": 4544}) == read(FALCON_7B)


def test_falcon_11b_has_one_norm_for_its_groups():
    spec = read(FALCON_11B)
    mixer, ffn = parts(spec)
    assert (mixer.heads, mixer.kv_heads, ffn.width) == (32, 8, 16384)
    assert (spec.layers[0].placement, spec.max_positions) == ("parallel", 8192)
    assert mixer.rope == Rope(theta=500042.0, rotated=128) and not spec.tied


def test_falcon_rw_has_coarse_alibi():
    spec = read(FALCON_RW)
    mixer, ffn = parts(spec)
    assert (mixer.heads, mixer.kv_heads, mixer.rope) == (32, 32, None)
    assert mixer.alibi is not None and mixer.alibi_coarse
    assert (spec.layers[0].placement, mixer.qkv_bias, ffn.bias) == ("pre", True, True)


def test_mpt_storywriter_has_the_slopes_that_it_was_trained_with():
    spec = read(STORYWRITER)
    mixer, ffn = parts(spec)
    assert (mixer.clip, mixer.scale, ffn.width) == (6.0, 128**-0.5, 16384)
    assert mixer.alibi is not None and (mixer.alibi[0], mixer.alibi[-1]) == (2**-0.5, 2**-16)
    assert (spec.max_positions, spec.tied, spec.layers[0].norm.bias) == (65536, True, False)


def test_command_r():
    spec = read(COMMAND_R)
    mixer, _ = parts(spec)
    assert mixer.rope == Rope(theta=8e6, rotated=128, pairing="neighbours")
    assert (spec.logit_scale, spec.max_positions, spec.tied) == (0.0625, 131072, True)
    assert mixer.qk_norm is None and spec.layers[0].placement == "parallel"


def test_command_r_plus_norms_each_head():
    mixer, _ = parts(read(COMMAND_R_PLUS))
    assert mixer.qk_norm is not None and mixer.qk_norm.over == "heads"
    assert (mixer.heads, mixer.kv_heads) == (96, 8)


def test_command_r7b_rotates_where_it_slides():
    spec = read(COMMAND_R7B)
    mixers = [parts(spec, i)[0] for i in range(32)]
    assert [m.window for m in mixers] == [4096, 4096, 4096, None] * 8
    assert [m.rope is None for m in mixers] == [False, False, False, True] * 8
    assert spec.logit_scale == 0.25


def test_minitron_has_heads_wider_than_their_share():
    spec = read(MINITRON)
    mixer, ffn = parts(spec)
    assert (mixer.heads, mixer.kv_heads, mixer.head_width) == (48, 8, 128)
    assert mixer.rope == Rope(theta=10_000.0, rotated=64)
    assert (ffn.act, ffn.gated, spec.layers[0].norm.weight) == ("relu2", False, "one_plus")


def attn(**keys: Any) -> dict[str, Any]:
    return {"attn_config": {**STORYWRITER["attn_config"], **keys}}


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (BLOOM, {"n_inner": 5}, "n_inner=5 is not implemented, only 57344"),
        (BLOOM, {"hidden_size": 5}, "hidden_size=5 and n_embed=14336 mean the same"),
        (FALCON_7B, {"auto_map": {"AutoModel": "my.Model"}}, "Python code"),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 with new"),
        (FALCON_11B, {"parallel_attn": False}, "and parallel_attn=False is not implemented"),
        (FALCON_11B, {"num_kv_heads": 5}, "=32 is not a multiple of num_kv_heads=5"),
        (FALCON_RW, {"num_kv_heads": 8}, "num_kv_heads=8 is not implemented, only 32"),
        (FALCON_RW, {"hidden_size": 2049}, "hidden_size=2049 is not a multiple"),
        (STORYWRITER, attn(prefix_lm=True), "attn_config: prefix_lm=True"),
        (STORYWRITER, attn(qk_ln=True), "attn_config: qk_ln=True"),
        (STORYWRITER, attn(alibi=False), "alibi=False is not implemented, only True: its pos"),
        (STORYWRITER, attn(attn_type="multiquery_attention"), "attn_type='multiquery_attention'"),
        (STORYWRITER, attn(rope=True), "attn_config: nothing reads rope=True"),
        (STORYWRITER, {"logit_scale": "inv_sqrt_d_model"}, "logit_scale='inv_sqrt_d_model'"),
        (STORYWRITER, {"no_bias": False}, "no_bias=False"),
        (STORYWRITER, {"norm_type": "rmsnorm"}, "norm_type='rmsnorm'"),
        (STORYWRITER, {"embedding_fraction": 0.1}, "embedding_fraction=0.1"),
        (COMMAND_R7B, {"use_qk_norm": True}, "use_qk_norm=True"),
        (COMMAND_R7B, {"rotary_pct": 0.5}, "rotary_pct=0.5"),
        (COMMAND_R7B, {"layer_switch": 3}, "layer_switch=3 is not implemented, only 4"),
        (MINITRON, {"kv_channels": 64}, "kv_channels=64 is not implemented, only 128"),
    ],
)
def test_a_value_that_we_cannot_honour_is_refused_by_name(base, keys, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(base, **keys)

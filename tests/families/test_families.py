"""A family reads every key that matters, exactly as transformers does, and refuses the rest."""

import math
import re
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig
from transformers.activations import ACT2FN

from ardor.arch.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling
from ardor.errors import ConfigError
from ardor.families import FAMILIES, family_of
from ardor.families.family import ACTS, HARMLESS
from ardor.families.hf_config import HFConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 1}
QWEN2 = {**MISTRAL, "model_type": "qwen2"}
QWEN3 = {**MISTRAL, "model_type": "qwen3"}
BY_NAME = {"llama": LLAMA, "gpt2": GPT2}


def read(base: dict[str, Any], **keys):
    config = {**base, **keys}
    return family_of(config).spec(HFConfig(config, path="config.json"))


def test_llama_defaults_are_those_of_transformers():
    spec, theirs = read(LLAMA), LlamaConfig(**LLAMA)
    mixer = spec.layers[0].mixer
    assert (mixer.heads, mixer.kv_heads) == (3, theirs.num_key_value_heads)
    assert (mixer.head_width, mixer.scale) == (theirs.head_dim, 8**-0.5)
    assert mixer.rope == Rope(theta=theirs.to_dict()["rope_parameters"]["rope_theta"], rotated=8)
    assert (mixer.qkv_bias, mixer.out_bias, spec.layers[0].ffn.bias) == (False,) * 3
    assert spec.norm.eps == theirs.rms_norm_eps
    assert spec.max_positions == theirs.max_position_embeddings
    assert (spec.tied, len(spec.layers), spec.learned_positions) == (False, 2, False)


def test_gpt2_defaults_are_those_of_transformers():
    spec, theirs = read(GPT2), GPT2Config(**GPT2)
    layer = spec.layers[0]
    assert (layer.mixer.heads, layer.mixer.kv_heads, layer.mixer.rope) == (3, 3, None)
    assert (layer.ffn.width, layer.ffn.gated, layer.ffn.act) == (96, False, "gelu_tanh")
    assert (spec.norm.kind, spec.norm.eps) == ("layer", theirs.layer_norm_epsilon)
    assert (spec.tied, spec.max_positions, spec.learned_positions) == (True, 16, True)


def test_gpt2_scales_its_scores_as_flagged():
    def scales(**flags):
        return [layer.mixer.scale for layer in read(GPT2, **flags).layers]

    assert scales() == [8**-0.5] * 3
    assert scales(scale_attn_weights=False) == [1.0] * 3
    assert scales(scale_attn_by_inverse_layer_idx=True) == [8**-0.5 / i for i in (1, 2, 3)]
    assert scales(reorder_and_upcast_attn=True) == [8**-0.5] * 3


@pytest.mark.parametrize("name", ACTS)
def test_an_activation_has_the_values_of_transformers(name):
    import torch

    from ardor.arch.mlp import ACTIVATIONS

    x = torch.linspace(-6, 6, 301)
    torch.testing.assert_close(ACTIVATIONS[ACTS[name]](x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


SCALINGS = [
    ({"rope_type": "linear", "factor": 4}, LinearScaling(factor=4.0)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=64),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        YarnScaling(factor=4.0, original_positions=64, attention_factor=0.1 * math.log(4) + 1),
    ),
    ({"rope_type": "default"}, None),
]


@pytest.mark.parametrize(("scaling", "expected"), SCALINGS)
def test_both_forms_of_rope_mean_the_same(scaling, expected):
    rope = Rope(theta=5e5, rotated=8, scaling=expected)
    old = {key: value for key, value in scaling.items() if key != "rope_type"}
    forms = [
        {"rope_parameters": {**scaling, "rope_theta": 5e5}},
        {"rope_parameters": scaling, "rope_theta": 5e5},
        {"rope_scaling": scaling, "rope_theta": 5e5},
        {"rope_scaling": {**old, "type": scaling["rope_type"]}, "rope_theta": 5e5},
    ]
    for form in forms:
        assert read(LLAMA, **form).layers[0].mixer.rope == rope


def test_forms_of_rope_that_disagree_are_refused():
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    }
    read(LLAMA, **both)
    both["rope_parameters"]["factor"] = 4.0
    with pytest.raises(ConfigError, match=r"rope_scaling gives .* but rope_parameters gives"):
        read(LLAMA, **both)


def test_the_original_context_defaults_to_the_present_one_and_the_outer_key_wins():
    yarn = {"rope_type": "yarn", "factor": 4.0}

    def original(**keys) -> int:
        rope = read(LLAMA, max_position_embeddings=128, **keys).layers[0].mixer.rope
        assert rope is not None and isinstance(rope.scaling, YarnScaling)
        theirs = LlamaConfig(**LLAMA, max_position_embeddings=128, **keys)
        theirs.standardize_rope_params()  # as its rotary module does once more
        found = theirs.to_dict()["rope_parameters"]["original_max_position_embeddings"]
        assert found == rope.scaling.original_positions
        return found

    assert original(rope_parameters=dict(yarn)) == 128
    assert original(rope_parameters=dict(yarn), original_max_position_embeddings=32) == 32
    inner = {**yarn, "original_max_position_embeddings": 64}
    assert original(rope_parameters=dict(inner), original_max_position_embeddings=32) == 32


@pytest.mark.parametrize("family", BY_NAME)
def test_an_unknown_key_is_refused_by_name(family):
    with pytest.raises(ConfigError, match=r"config\.json: nothing reads clip_qkv=8"):
        read(BY_NAME[family], clip_qkv=8)


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (LLAMA, {"hidden_act": "mish"}, "hidden_act='mish' is not implemented; expected silu |"),
        (LLAMA, {"num_key_value_heads": 2}, "=3 is not a multiple of num_key_value_heads=2"),
        (LLAMA, {"hidden_size": 25}, "hidden_size=25 is not a multiple"),
        (LLAMA, {"head_dim": 7}, "odd width 7"),
        (LLAMA, {"sliding_window": 8}, "sliding_window=8 is not implemented, only None"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_scaling": {"type": "mrope"}}, "rope_type='mrope' is not"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "axial"}},
            "default | linear | dynamic | llama3 | yarn",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "config.json, rope_scaling: no 'factor'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "b": 1}}, "nothing reads b=1"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "nothing reads full_attention={}"),
        (LLAMA, {"quantization_config": {"quant_method": "hqq"}}, "quantization_config={"),
        (LLAMA, {"auto_map": {"AutoModel": "code.Model"}}, "Python code"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is not a number"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
        (GPT2, {"n_head": 5}, "n_embd=24 is not a multiple of n_head=5"),
        (GPT2, {"scale_attn_weights": 1}, "scale_attn_weights=1 is neither true nor false"),
        (GPT2, {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
    ],
)
def test_a_value_that_we_cannot_honour_is_refused_by_name(base, keys, says):
    read(base)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read(base, **keys)


def test_released_configs_are_read_whole():
    """The keys of files on the hub: openai-community/gpt2*, SmolLM2, TinyLlama, Llama 3.2."""
    read(
        GPT2,
        architectures=["GPT2LMHeadModel"],
        n_ctx=16,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        initializer_range=0.02,
        summary_activation=None,
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_type="cls_index",
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        bos_token_id=50256,
        eos_token_id=50256,
        _num_labels=1,
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        gradient_checkpointing=False,
        n_special=0,
        predict_special_tokens=True,
        output_past=True,
    )
    spec = read(
        LLAMA,
        _name_or_path="x",
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=[128001, 128008, 128009],
        is_llama_config=True,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        pretraining_tp=1,
        torch_dtype="bfloat16",
        transformers_version="4.42.3",
        use_cache=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )
    assert spec.layers[0].mixer.rope == Rope(theta=100_000.0, rotated=8)


def test_every_harmless_key_has_a_reason():
    assert all(HARMLESS.values()) and "tie_word_embeddings" not in HARMLESS


def test_what_transformers_writes_is_read_whole():
    for config in (LlamaConfig(**LLAMA), GPT2Config(**GPT2)):
        for written in (config.to_dict(), config.to_diff_dict()):
            assert read(written) == read(BY_NAME[written["model_type"]])


CONFIGS = [
    {**LLAMA, "num_key_value_heads": 1, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    {**LLAMA, "tie_word_embeddings": True, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5},
    *({**LLAMA, "rope_parameters": {**s, "rope_theta": 2e4}} for s, _ in SCALINGS),
    {**GPT2, "n_inner": 7, "activation_function": "relu", "tie_word_embeddings": False},
    {**GPT2, "scale_attn_weights": False},
    {**GPT2, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    {**MISTRAL, "sliding_window": 5, "rope_theta": 1e6},
    {**MISTRAL, "sliding_window": None, "head_dim": 10, "tie_word_embeddings": True},
    {**QWEN2, "tie_word_embeddings": True},
    {**QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {**QWEN2, "rope_scaling": SCALINGS[2][0]},
    {**QWEN3, "attention_bias": True},
    {
        **QWEN3,
        "head_dim": 10,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_spec_is_written_as_a_config_that_means_the_same_to_both(config):
    family, spec = family_of(config), read(config)
    written = family.config(spec, dtype="bfloat16", bos=1, eos=[2, 3], pad=None)
    assert read(written) == spec
    peer = CONFIG_MAPPING[config["model_type"]].from_dict(dict(written))
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (1, [2, 3], None)
    assert str(peer.dtype) == "torch.bfloat16"
    assert read(peer.to_dict()) == spec


def test_a_spec_that_a_family_cannot_express_is_refused():
    with pytest.raises(ConfigError, match="llama"):
        FAMILIES["llama"].config(read(GPT2))
    with pytest.raises(ConfigError, match="the mistral family cannot express"):
        FAMILIES["mistral"].config(read(QWEN2))
    with pytest.raises(ConfigError, match="the qwen2 family cannot express"):
        FAMILIES["qwen2"].config(read(QWEN3))
    with pytest.raises(ConfigError, match="the gpt2 family cannot express"):
        FAMILIES["gpt2"].config(read(LLAMA))


def test_an_unknown_family_is_refused_with_what_is_known():
    with pytest.raises(
        ConfigError, match=r"model_type='lama' .* \(like 'llama'\); .* llama \| gpt2"
    ):
        family_of({"model_type": "lama"})
    with pytest.raises(ConfigError, match="model_type=None"):
        family_of({})


def test_linear_maps_have_the_names_that_adapters_use():
    llama = FAMILIES["llama"].disk_linears(read(LLAMA))
    assert llama["layers.1.mixer.q_proj"] == (
        "model.layers.1.self_attn.q_proj",
        0,
        1,
        False,
        1,
        False,
        None,
    )
    assert llama["lm_head"] == ("lm_head", 0, 1, False, 1, False, None)
    assert llama["embed_tokens"] == ("model.embed_tokens", 0, 1, False, 1, False, None)
    assert len(llama) == (7 + 2) * 2 + 3  # norms can be trained in full
    gpt2 = FAMILIES["gpt2"].disk_linears(read(GPT2))
    assert gpt2["layers.0.mixer.v_proj"] == (
        "transformer.h.0.attn.c_attn",
        2,
        3,
        True,
        1,
        False,
        None,
    )
    assert gpt2["layers.2.ffn.down_proj"] == (
        "transformer.h.2.mlp.c_proj",
        0,
        1,
        True,
        1,
        False,
        None,
    )
    assert gpt2["embed_tokens"] == ("transformer.wte", 0, 1, False, 1, False, None)
    assert len(gpt2) == (6 + 2) * 3 + 3  # its head is tied; positions have a table

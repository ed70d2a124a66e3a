"""The config.json files of Gemma 4, put together from what other projects quote of them."""

from typing import Any

import pytest
from transformers import AutoConfig

from ardor.arch.spec import Attention, Decoder, Experts, Mlp, ProportionalScaling, Rope
from ardor.errors import ConfigError
from ardor.families import family_of

from .test_families import read


def kinds(sliding: int, layers: int) -> list[str]:
    pattern = ["sliding_attention"] * sliding + ["full_attention"]
    return (pattern * layers)[:layers]


TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
AROUND: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoa_token_index": 258883,
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0.dev0",
    "video_token_id": 258884,
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 1152},
    "vision_soft_tokens_per_image": 280,
}
E2B: dict[str, Any] = {  # google/gemma-4-E2B-it
    **AROUND,
    "audio_config": {"model_type": "gemma4_audio"},
    "text_config": {
        **TEXT,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "layer_types": kinds(4, 35),
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "sliding_window": 512,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": True,
    },
}
DENSE_31B: dict[str, Any] = {  # google/gemma-4-31B-it
    **AROUND,
    "text_config": {
        **TEXT,
        "attention_k_eq_v": True,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "layer_types": kinds(5, 60),
        "num_attention_heads": 32,
        "num_global_key_value_heads": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 16,
    },
}
A4B: dict[str, Any] = {  # google/gemma-4-26B-A4B-it
    **AROUND,
    "text_config": {
        **TEXT,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "layer_types": kinds(5, 30),
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "top_k_experts": 8,
    },
}
RELEASED = {"e2b": E2B, "31b": DENSE_31B, "26b a4b": A4B}


def text(config: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**config["text_config"], **keys}


def mixers(spec: Decoder) -> list[Attention]:
    found = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, Attention) for mixer in found)
    return found


@pytest.mark.parametrize("config", RELEASED.values(), ids=RELEASED)
def test_a_published_config_means_what_transformers_makes_of_it(config):
    """They say of each layer what it has unlike the others; both must be read alike."""
    rewritten = AutoConfig.for_model(**config).to_dict()
    assert rewritten["text_config"]["per_layer_config"]
    assert "global_head_dim" not in rewritten["text_config"]
    assert read(rewritten) == read(config) == read(config["text_config"])


def test_twenty_layers_of_e2b_make_no_keys_and_are_twice_as_wide():
    spec = read(E2B)
    found = mixers(spec)
    assert [mixer.kv_layer for mixer in found[:15]] == [None] * 15
    assert [mixer.kv_layer for mixer in found[15:20]] == [13, 13, 13, 13, 14]
    widths = [layer.ffn.width for layer in spec.layers if isinstance(layer.ffn, Mlp)]
    assert widths == [6144] * 15 + [12288] * 20
    assert spec.token_input is not None and spec.token_input.width == 256
    assert (found[0].window, found[4].window, found[0].scale) == (512, None, 1.0)


def test_full_layers_are_of_another_shape_and_turn_a_quarter_of_their_channels():
    local, full = (mixers(read(DENSE_31B))[i] for i in (0, 5))
    assert (local.head_width, local.kv_heads, local.values_from_keys) == (256, 16, False)
    assert (full.head_width, full.kv_heads, full.values_from_keys) == (512, 4, True)
    assert local.rope == Rope(theta=1e4, rotated=256)
    proportion = ProportionalScaling(turning=64)
    assert full.rope == Rope(theta=1e6, rotated=512, scaling=proportion)
    # A number of its own for full layers counts only where keys are values.
    other = mixers(read(text(DENSE_31B, attention_k_eq_v=False)))[5]
    assert (other.kv_heads, other.values_from_keys) == (16, False)


def test_experts_stand_beside_a_feed_forward():
    ffn = read(A4B).layers[0].ffn
    assert isinstance(ffn, Experts) and ffn.shared is not None and ffn.norm is not None
    assert (ffn.count, ffn.router.per_token, ffn.expert.width) == (128, 8, 704)
    assert (ffn.shared.width, ffn.router.read_scale) == (2112, 2816**-0.5)


def test_maps_that_no_layer_needs_may_be_in_the_files():
    """Those of E2B hold keys and values of the layers that read others'."""
    family, spec = family_of(E2B), read(E2B)
    names = {name for rule in family.rules(spec).plain for name in rule.names}
    place = "model.language_model.layers.{}.self_attn.{}.weight"
    unused = {place.format(34, part) for part in ("k_proj", "v_proj", "k_norm")}
    rules = family.rules(spec).bind(names | unused)
    rules.check(names | unused, "here")
    assert {*rules.kept(names | unused)} == unused
    assert place.format(14, "k_proj") in names
    account = rules.account(names | {place.format(2, "k_proj_2")})
    assert account.unexpected == (place.format(2, "k_proj_2"),)


@pytest.mark.parametrize(
    ("base", "keys", "says"),
    [
        (E2B, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        (E2B, {"num_kv_shared_layers": 35}, "no sliding_attention layer of the same shape"),
        (E2B, {"num_kv_shared_layers": 31}, "no full_attention layer of the same shape"),
        (E2B, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "no 'sliding_att"),
        (E2B, {"per_layer_config": {"35": {"head_dim": 4}}}, "nothing reads 35="),
        (E2B, {"per_layer_config": {"4": {"clip": 4}}}, "nothing reads clip=4"),
        (E2B, {"per_layer_config": {"34": {"head_dim": 512}}}, "of the same shape is before"),
        (E2B, {"sliding_window": None}, "no window is in use"),
        (A4B, {"top_k_experts": 129}, "top_k_experts=129 of only 128 experts"),
        (A4B, {"moe_intermediate_size": None}, "no 'moe_intermediate_size'"),
        (A4B, {"attn_logit_softcapping": 50.0}, "nothing reads attn_logit_softcapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(base, keys, says):
    with pytest.raises(ConfigError, match=says):
        read(text(base, **keys))

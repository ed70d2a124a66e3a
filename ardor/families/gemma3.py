"""Gemma 3, its text models. HF model_type "gemma3_text", and within "gemma3", which reads images.

Source: Gemma Team 2025, arXiv:2503.19786; transformers 5.23, models/gemma3. Its configuration
ignores a `type` in `rope_scaling`, an older name of `rope_type`; here that scales, too.
"""

from dataclasses import replace

from ardor.arch.spec import Decoder, Layer, QKNorm
from ardor.families.blocks import (
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    read_mlp,
    read_windows,
    rms,
    with_attention,
)
from ardor.families.family import Family
from ardor.families.gemma2 import NAMES
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rope import read_layer_ropes
from ardor.families.rules import Ignorable

_THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=4, head_width=256)
    max_positions = hf.count("max_position_embeddings", 131_072)
    hf.take("hidden_act", None)  # hidden_activation decides
    hf.require("use_bidirectional_attention", False, "a position never reads what follows it")
    hf.require("attn_logit_softcapping", None, "queries and keys are normalised instead")
    ropes = read_layer_ropes(
        hf, head_width=found.head_width, max_positions=max_positions, thetas=_THETAS
    )
    bias = hf.flag("attention_bias", False)
    norm = rms(hf, weight="one_plus", late_cast=True)
    layer = Layer(
        mixer=attention(
            found,
            None,
            scale=hf.number("query_pre_attn_scalar", 256.0) ** -0.5,
            qk_norm=QKNorm(norm=norm),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_mlp(hf, act_key="hidden_activation", act="gelu_pytorch_tanh"),
        norm=norm,
        placement="sandwich",
    )
    # Newer files keep the first key only as a note, with an underscore, beside layer_types.
    pattern = hf.count("sliding_window_pattern", hf.count("_sliding_window_pattern", 6))
    kinds = read_layer_types(hf, lambda i: (i + 1) % pattern != 0)
    return read_decoder(
        hf,
        found,
        tuple(
            with_attention(layer, rope=ropes[kind], window=window)
            for kind, window in zip(kinds, read_windows(hf, kinds, 4096), strict=True)
        ),
        max_positions=max_positions,
        tied=True,
        embed_scale=found.width**0.5,
        logit_softcap=hf.optional_number("final_logit_softcapping"),
    )


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    models="Gemma 3 270M, 1B",
    unlike="1 + w sandwich norms, windows, two rotations",
    read=_read,
    name_tensors=NAMES.rules,
)

# The text_config of published files relies on these.
_TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
_IMAGES = (
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
)


def _read_multimodal(hf: HFConfig) -> Decoder:
    """The decoder of text alone: no images come in here."""
    for key in _IMAGES:
        hf.take(key, None)
    held = hf.section("text_config")
    raw = {} if held is None else held.raw
    text = HFConfig({**_TEXT_DEFAULTS, **raw}, path=f"{hf.path}, text_config")
    for part in (hf, text):
        part.require("tie_word_embeddings", True, "the head is the embedding beside images, too")
    return GEMMA3_TEXT.spec(text)


MULTIMODAL_NAMES: Names = replace(
    NAMES,
    prefix="model.language_model.",
    aliases=("language_model.model.",),  # as files have it
    layer="model.language_model.layers.{}.",
    outside={
        "embed_tokens": "model.language_model.embed_tokens",
        "norm": "model.language_model.norm",
        "lm_head": "lm_head",
    },
    ignorable=(
        Ignorable(
            pattern=r"(model\.)?(vision_tower|multi_modal_projector)\..+",
            reason="turns images into embeddings",
            kept=True,
        ),
    ),
)

GEMMA3 = Family(
    model_type="gemma3",
    models="Gemma 3 4B, 12B, 27B, text",
    unlike="as `gemma3_text`; the image tensors are kept unread",
    read=_read_multimodal,
    name_tensors=MULTIMODAL_NAMES.rules,
)

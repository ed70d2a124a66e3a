"""Gemma 3, its text models. HF model_type "gemma3_text", and within "gemma3", which reads images.

Source: Gemma Team 2025, arXiv:2503.19786; transformers 5.23, models/gemma3. Its configuration
ignores a `type` in `rope_scaling`, an older name of `rope_type`; here that scales, too.
"""

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
from ardor.families.images import beside_images, read_text, text_keys
from ardor.families.rope import read_layer_ropes

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
    windows = read_windows(hf, kinds, hf.optional_count("sliding_window", 4096))
    return read_decoder(
        hf,
        found,
        tuple(
            with_attention(layer, rope=ropes[kind], window=window)
            for kind, window in zip(kinds, windows, strict=True)
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


def _read_multimodal(hf: HFConfig) -> Decoder:
    held = hf.section("text_config")
    for part in (hf,) if held is None else (hf, held):
        part.require("tie_word_embeddings", True, "the head is the embedding beside images, too")
    return read_text(hf, text_keys(hf, _TEXT_DEFAULTS), {"gemma3_text": GEMMA3_TEXT})


MULTIMODAL_NAMES = beside_images(
    NAMES,
    "model.language_model.",
    r"(model\.)?(vision_tower|multi_modal_projector)\..+",
    aliases=("language_model.model.",),  # as files have it
)

GEMMA3 = Family(
    model_type="gemma3",
    models="Gemma 3 4B, 12B, 27B, text",
    unlike="as `gemma3_text`; the image tensors are kept unread",
    read=_read_multimodal,
    name_tensors=MULTIMODAL_NAMES.rules,
)

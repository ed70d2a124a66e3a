"""OLMo 1 to 3. HF model_types "olmo", "olmo2" and "olmo3".

Source: OLMo 1: arXiv:2402.00838; 2: arXiv:2501.00656; 3: arXiv:2512.13961; transformers 5.23,
models/olmo, olmo2, olmo3. From a version-4 file transformers 5 forgets `rope_theta` on the sliding
layers of OLMo 3; here it counts for all layers, as in training.
"""

from ardor.arch.spec import Decoder, Layer, Norm, QKNorm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_LAYER,
    LLAMA_MLP,
    LLAMA_OUTSIDE,
    Heads,
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
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rope import LAYER_TYPES, read_layer_ropes, read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules=LLAMA_LAYER,
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)
POST_NORM_NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        **LLAMA_ATTENTION,
        "mixer_out_norm": "post_attention_layernorm",
        **LLAMA_MLP,
        "ffn_out_norm": "post_feedforward_layernorm",
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read_olmo(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    bias = hf.flag("attention_bias", False)
    mixer = attention(
        found,
        read_rope(hf, head_width=found.head_width, max_positions=max_positions),
        clip=hf.optional_number("clip_qkv"),
        qkv_bias=bias,
        out_bias=bias,
    )
    norm = Norm(kind="layer", eps=1e-5, weight="none")  # the files do not say it
    layer = Layer(mixer=mixer, ffn=read_mlp(hf), norm=norm)
    return read_decoder(hf, found, layer, max_positions=max_positions)


def _post_norm_layer(hf: HFConfig, found: Heads) -> Layer:
    """The layer of OLMo 2 and 3, which does not turn yet."""
    norm, bias = rms(hf, 1e-5, late_cast=True), hf.flag("attention_bias", False)
    qk_norm = QKNorm(norm=norm, over="width")
    mixer = attention(found, None, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias)
    return Layer(mixer=mixer, ffn=read_mlp(hf), norm=norm, placement="post")


def _read_olmo2(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = with_attention(_post_norm_layer(hf, found), rope=rope)
    return read_decoder(hf, found, layer, max_positions=max_positions)


def _read_olmo3(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    ropes = read_layer_ropes(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        thetas=dict.fromkeys(LAYER_TYPES, ("rope_theta", 500_000.0)),
    )
    layer = _post_norm_layer(hf, found)
    kinds = read_layer_types(hf, lambda i: (i + 1) % 4 != 0)
    windows = read_windows(hf, kinds, hf.optional_count("sliding_window", 4096))
    layers = tuple(
        with_attention(layer, rope=ropes[kind], window=window)
        for kind, window in zip(kinds, windows, strict=True)
    )
    return read_decoder(hf, found, layers, max_positions=max_positions)


OLMO = Family(
    model_type="olmo",
    models="OLMo 1",
    unlike="norms without weights, `clip_qkv`",
    read=_read_olmo,
    name_tensors=NAMES.rules,
)
OLMO2 = Family(
    model_type="olmo2",
    models="OLMo 2",
    unlike="norms after, queries and keys normed over their width",
    read=_read_olmo2,
    name_tensors=POST_NORM_NAMES.rules,
)
OLMO3 = Family(
    model_type="olmo3",
    models="OLMo 3",
    unlike="as `olmo2`, with windows",
    read=_read_olmo3,
    name_tensors=POST_NORM_NAMES.rules,
)

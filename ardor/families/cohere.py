"""Command R, R+, R7B, A and Aya. HF model_types "cohere" and "cohere2".

Source: model cards of c4ai-command-r-v01 and c4ai-command-r7b-12-2024; transformers 5.23,
models/cohere and models/cohere2.
"""

from dataclasses import replace

from ardor.arch.spec import Attention, Decoder, Layer, Norm, QKNorm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_MLP,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    read_mlp,
    with_attention,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={"mixer_norm": "input_layernorm", **LLAMA_ATTENTION, **LLAMA_MLP},
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    qk_normed = hf.flag("use_qk_norm", False)
    hf.take("pretraining_tp", 1)  # its slices of a matrix product give the same sums
    return _read_layers(hf, theta=500_000.0, qk_normed=qk_normed)


def _read_cohere2(hf: HFConfig) -> Decoder:
    # What the released files say beside the keys that transformers reads.
    hf.require("use_qk_norm", False, "queries and keys are not normalised")
    hf.require("use_parallel_block", True, "attention and feed-forward read the same norm")
    hf.require("use_gated_activation", True, "the feed-forward is gated")
    hf.require("position_embedding_type", "rope_gptj", "neighbouring channels turn together")
    hf.require("rotary_pct", 1.0, "heads turn whole")
    hf.require("order_of_interleaved_layers", "local_attn_first", "layer_types says the order")
    hf.take("use_parallel_embedding", None)  # how the embedding is held by several devices
    hf.take("cache_implementation", None)  # for generate() of transformers
    shared = hf.flag("use_embedding_sharing", True)
    period = hf.count("sliding_window_pattern", hf.take("layer_switch", 4))
    hf.require("layer_switch", period, "another name of sliding_window_pattern")
    spec = _read_layers(hf, theta=10_000.0, tied=shared)
    window = hf.count("sliding_window", 4096)
    kinds = read_layer_types(hf, lambda i: (i + 1) % period != 0)
    layers = zip(spec.layers, kinds, strict=True)
    return replace(spec, layers=tuple(_as(layer, kind, window) for layer, kind in layers))


def _as(layer: Layer, kind: str, window: int) -> Layer:
    """Layers that slide rotate; those that read all positions know of none."""
    if kind == "sliding_attention":
        return with_attention(layer, window=window)
    assert isinstance(layer.mixer, Attention)
    return replace(layer, mixer=replace(layer.mixer, rope=None))


def _read_layers(
    hf: HFConfig, *, theta: float, qk_normed: bool = False, tied: bool = True
) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 8192)
    norm = Norm(kind="layer", eps=hf.number("layer_norm_eps", 1e-5))
    bias = hf.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            found,
            read_rope(
                hf,
                head_width=found.head_width,
                max_positions=max_positions,
                theta=theta,
                pairing="neighbours",
            ),
            qk_norm=QKNorm(norm=norm, over="heads") if qk_normed else None,
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_mlp(hf),
        norm=norm,
        placement="parallel",
    )
    return read_decoder(
        hf,
        found,
        layer,
        # Command R was trained for longer texts than max_position_embeddings, a table's size, says.
        max_positions=max(max_positions, hf.count("model_max_length", max_positions)),
        tied=tied,
        logit_scale=hf.number("logit_scale", 0.0625),
    )


COHERE = Family(
    model_type="cohere",
    models="Command R, R+",
    unlike="parallel, norms per head, logit scale",
    read=_read,
    name_tensors=NAMES.rules,
    code=("configuration_cohere", "modeling_cohere"),
)
COHERE2 = Family(
    model_type="cohere2",
    models="Command R7B, Command A",
    unlike="parallel, windows, full layers that do not turn",
    read=_read_cohere2,
    name_tensors=NAMES.rules,
)

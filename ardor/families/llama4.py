"""The language model of Llama 4 (Scout, Maverick). HF model_type "llama4_text".

Source: Meta 2025, "The Llama 4 herd"; transformers 5.23, models/llama4.
"""

from dataclasses import replace
from typing import Any

from ardor.arch.spec import Attention, Decoder, Experts, Layer, Mlp, QKNorm, Router, Temperature
from ardor.errors import ConfigError
from ardor.families.blocks import (
    LLAMA_ATTENTION,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    rms,
)
from ardor.families.family import ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import AllExperts, Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate_proj": "feed_forward.gate_proj",
        "ffn.up_proj": "feed_forward.up_proj",
        "ffn.down_proj": "feed_forward.down_proj",
        "ffn.router": "feed_forward.router",
        ("ffn.experts.gate_proj", "ffn.experts.up_proj"): AllExperts(
            "feed_forward.experts.gate_up_proj", transposed=True
        ),
        "ffn.experts.down_proj": AllExperts("feed_forward.experts.down_proj", transposed=True),
        "ffn.shared.gate_proj": "feed_forward.shared_expert.gate_proj",
        "ffn.shared.up_proj": "feed_forward.shared_expert.up_proj",
        "ffn.shared.down_proj": "feed_forward.shared_expert.down_proj",
    },
    outside=LLAMA_OUTSIDE,
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8, head_width=128)
    max_positions = hf.count("max_position_embeddings", 131072)
    hf.take("cache_implementation", None)  # how a Python call keeps keys and values
    hf.take("for_llm_compressor", None)  # how older code arranged the experts in memory
    for key in ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        hf.take(key, None)  # training; transformers applies no jitter
    norm, bias = rms(hf, 1e-5), hf.flag("attention_bias", False)
    rope = read_rope(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        theta=500_000.0,
        pairing="neighbours",
    )
    turning = attention(
        found,
        rope,
        qk_norm=QKNorm(norm=replace(norm, weight="none"), after_rope=True)
        if hf.flag("use_qk_norm", True)
        else None,
        qkv_bias=bias,
        out_bias=bias,
    )
    still = replace(turning, rope=None, qk_norm=None, temperature=_temperature(hf))
    turns = _turning_layers(hf)
    kinds = read_layer_types(hf, lambda i: turns[i], local="chunked_attention")
    chunk = hf.count("attention_chunk_size", 8192)
    dense, experts = _feed_forwards(hf)
    with_experts = _layers_with_experts(hf)

    def layer(index: int) -> Layer:
        mixer: Attention = turning if turns[index] else still
        return Layer(
            mixer=replace(mixer, chunk=chunk if kinds[index] == "chunked_attention" else None),
            ffn=experts if index in with_experts else dense,
            norm=norm,
        )

    layers = tuple(layer(index) for index in range(len(turns)))
    return read_decoder(hf, found, layers, max_positions=max_positions)


def _temperature(hf: HFConfig) -> Temperature | None:
    found = Temperature(
        slope=hf.number("attn_scale", 0.1), span=hf.count("floor_scale", 8192), first=1
    )
    # Older files have a number, of which only that it is not zero counts.
    asked = hf.take("attn_temperature_tuning", True)
    if not isinstance(asked, bool):
        asked = bool(hf.number("attn_temperature_tuning"))
    return found if asked else None


def _turning_layers(hf: HFConfig) -> tuple[bool, ...]:
    """Which layers rotate: a 1 in `no_rope_layers`; an empty list means all but every fourth."""
    count, interval = hf.count("num_hidden_layers"), hf.count("no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(count)]
    found: Any = hf.take("no_rope_layers", default)
    found = default if found == [] else found
    if (
        not isinstance(found, list)
        or len(found) != count
        or any(type(turns) is not int or turns not in (0, 1) for turns in found)
    ):
        raise ConfigError(f"{hf.path}: no_rope_layers={found!r} is not a list of {count} 0s and 1s")
    return tuple(bool(turns) for turns in found)


def _layers_with_experts(hf: HFConfig) -> frozenset[int]:
    step, count = hf.count("interleave_moe_layer_step", 1), hf.count("num_hidden_layers")
    return hf.layer_set("moe_layers", count, list(range(step - 1, count, step)))


def _feed_forwards(hf: HFConfig) -> tuple[Mlp, Experts]:
    act = hf.choice("hidden_act", ACTS, "silu")
    expert = Mlp(width=hf.count("intermediate_size", 8192), act=act)
    router = Router(
        per_token=hf.count("num_experts_per_tok", 1), score="sigmoid", scales_input=True
    )
    return (
        Mlp(width=hf.count("intermediate_size_mlp", 16384), act=act),
        Experts(
            count=hf.count("num_local_experts", 16), expert=expert, router=router, shared=expert
        ),
    )


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    models="Llama 4, text",
    unlike="chunks, experts, growing queries",
    read=_read,
    name_tensors=NAMES.rules,
)

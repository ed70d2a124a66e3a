"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE. HF model_types "qwen2_moe" and "qwen3_moe".

Source: Yang et al. 2024, arXiv:2407.10671, section 2.2.2; Yang et al. 2025, arXiv:2505.09388;
transformers 5.23, models/qwen2_moe and models/qwen3_moe.
"""

from dataclasses import replace
from typing import Any

from ardor.arch.spec import Attention, Decoder, Experts, Layer, Mlp, QKNorm
from ardor.errors import ConfigError
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_LAYER,
    LLAMA_OUTSIDE,
    Heads,
    attention,
    read_decoder,
    read_heads,
    read_layer_types,
    read_mlp,
    rms,
    with_attention,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.moe import expert_places, read_balance, read_experts
from ardor.families.names import Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        **LLAMA_LAYER,
        "ffn.router": "mlp.gate",
        **expert_places("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
        "ffn.shared.gate_proj": "mlp.shared_expert.gate_proj",
        "ffn.shared.up_proj": "mlp.shared_expert.up_proj",
        "ffn.shared.down_proj": "mlp.shared_expert.down_proj",
        "ffn.shared_gate": "mlp.shared_expert_gate",
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read_qwen2(hf: HFConfig) -> Decoder:
    found, mlp = read_heads(hf, kv_heads=16), read_mlp(hf)
    experts = read_experts(
        hf,
        replace(mlp, width=hf.count("moe_intermediate_size", 1408)),
        count=60,
        per_token=4,
        shared=replace(mlp, width=hf.count("shared_expert_intermediate_size", 5632)),
        shared_gated=True,
        renormalise=hf.flag("norm_topk_prob", False),
    )
    # Windows alternate below `max_window_layers`, unlike Qwen2's. No published model has any.
    windows, below = hf.flag("use_sliding_window", False), hf.count("max_window_layers", 28)
    kinds = read_layer_types(hf, lambda i: windows and i % 2 == 0 and i < below)
    window = hf.count("sliding_window", 4096) if windows else hf.take("sliding_window", None)
    if "sliding_attention" in kinds and not windows:
        raise ConfigError(
            f"{hf.path}: layer_types has sliding_attention, but use_sliding_window is false"
        )
    mixer = {"qkv_bias": hf.flag("qkv_bias", True)}
    layers = tuple(
        with_attention(layer, window=window if kind == "sliding_attention" else None)
        for layer, kind in zip(_layers(hf, found, mixer, mlp, experts), kinds, strict=True)
    )
    return _decoder(hf, found, layers)


def _read_qwen3(hf: HFConfig) -> Decoder:
    found, mlp = read_heads(hf, kv_heads=4), read_mlp(hf)
    experts = read_experts(
        hf,
        replace(mlp, width=hf.count("moe_intermediate_size", 768)),
        count=128,
        per_token=8,
        renormalise=hf.flag("norm_topk_prob", False),
    )
    hf.take("max_window_layers", None)  # left from Qwen2: windows are on all layers or on none
    windows, bias = hf.flag("use_sliding_window", False), hf.flag("attention_bias", False)
    mixer = {
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": QKNorm(norm=rms(hf)),
        "window": hf.count("sliding_window", 4096) if windows else None,
    }
    hf.take("sliding_window", None)
    return _decoder(hf, found, _layers(hf, found, mixer, mlp, experts))


def _layers(
    hf: HFConfig, found: Heads, mixer: dict[str, Any], mlp: Mlp, experts: Experts
) -> tuple[Layer, ...]:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step, count = hf.count("decoder_sparse_step", 1), hf.count("num_hidden_layers")
    dense = hf.layer_set("mlp_only_layers", count, [])
    rope = read_rope(hf, head_width=found.head_width, max_positions=_max_positions(hf))
    attend: Attention = attention(found, rope, **mixer)
    return tuple(
        Layer(
            mixer=attend,
            ffn=experts if (i + 1) % step == 0 and i not in dense else mlp,
            norm=rms(hf),
        )
        for i in range(hf.count("num_hidden_layers"))
    )


def _decoder(hf: HFConfig, found: Heads, layers: tuple[Layer, ...]) -> Decoder:
    balance = read_balance(hf)
    return read_decoder(hf, found, layers, max_positions=_max_positions(hf), balance=balance)


def _max_positions(hf: HFConfig) -> int:
    return hf.count("max_position_embeddings", 32768)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    models="Qwen 1.5 and 2 MoE",
    unlike="experts, a gated shared expert",
    read=_read_qwen2,
    name_tensors=NAMES.rules,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    models="Qwen 3 MoE",
    unlike="experts, normed queries and keys",
    read=_read_qwen3,
    name_tensors=NAMES.rules,
)

"""Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE. HF model_type "phimoe".

Longrope's long factors take over past `original_max_position_embeddings`, as in the code published
with the weights; transformers 5.23 takes the short ones for any length there, and only its
amplitude changes.

Source: Abdin et al. 2024, arXiv:2404.14219; Liu et al. 2024 (GRIN), arXiv:2409.12136; transformers
5.23, models/phimoe.
"""

from ardor.arch.spec import Decoder, Layer, Norm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_mlp,
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
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn.router": ("block_sparse_moe.gate", "mlp.router"),
        **expert_places("block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8)
    max_positions = hf.count("max_position_embeddings", 131072)
    hf.take("input_jitter_noise", 0.0)  # in training alone, where Ardor adds no noise
    hf.take("hidden_dropout", 0.0)  # the same
    hf.require("num_experts_per_tok", 2, "its router takes the best and the best of the rest")
    head_bias = hf.flag("lm_head_bias", False)
    if head_bias:
        hf.require("tie_word_embeddings", False, "a tied head has no bias")
    window = None if hf.take("sliding_window", None) is None else hf.count("sliding_window")
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions, theta=1e6)
    layer = Layer(
        mixer=attention(found, rope, window=window, qkv_bias=bias, out_bias=bias),
        ffn=read_experts(
            hf,
            read_mlp(hf),
            count=16,
            per_token=2,
            score="sparsemixer",
            jitter=hf.number("router_jitter_noise", 0.01),
        ),
        norm=Norm(kind="layer", eps=hf.number("rms_norm_eps", 1e-5), bias=True),
    )
    return read_decoder(
        hf,
        found,
        layer,
        max_positions=max_positions,
        head_bias=head_bias,
        balance=read_balance(hf),
    )


PHIMOE = Family(
    model_type="phimoe",
    models="Phi-3.5-MoE",
    unlike="experts by sparsemixer, LongRoPE",
    read=_read,
    name_tensors=NAMES.rules,
    code=("configuration_phimoe", "modeling_phimoe"),
)

"""Granite 3 MoE. HF model_type "granitemoe".

Source: IBM Granite Team 2024, "Granite 3.0 Language Models"; transformers 5.23, models/granitemoe.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.moe import read_balance, read_experts
from ardor.families.names import AllExperts, Names
from ardor.families.rope import read_rope

# Experts are stacked on disk, too; the second names are those in the memory of transformers 5.
NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn.router": ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        ("ffn.experts.gate_proj", "ffn.experts.up_proj"): (
            AllExperts("block_sparse_moe.input_linear.weight"),
            AllExperts("block_sparse_moe.experts.gate_up_proj"),
        ),
        "ffn.experts.down_proj": (
            AllExperts("block_sparse_moe.output_linear.weight"),
            AllExperts("block_sparse_moe.experts.down_proj"),
        ),
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    bias = hf.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            found,
            read_rope(hf, head_width=found.head_width, max_positions=max_positions),
            scale=hf.number("attention_multiplier", 1.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_experts(hf, read_mlp(hf), count=8, per_token=2, score="chosen"),
        norm=rms(hf),
        residual_scale=hf.number("residual_multiplier", 1.0),
    )
    return read_decoder(
        hf,
        found,
        layer,
        max_positions=max_positions,
        embed_scale=hf.number("embedding_multiplier", 1.0),
        logit_scale=1 / hf.number("logits_scaling", 1.0),
        balance=read_balance(hf),
    )


GRANITE_MOE = Family(
    model_type="granitemoe",
    models="Granite 3 MoE",
    unlike="multipliers, experts",
    read=_read,
    name_tensors=NAMES.rules,
)

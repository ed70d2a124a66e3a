"""Nemotron 3 and 4, Minitron. HF model_type "nemotron".

Source: Parmar et al. 2024, arXiv:2402.16819; transformers 5.23, models/nemotron.
"""

from ardor.arch.spec import Decoder, Layer, Norm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_LAYER,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_mlp,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules=LLAMA_LAYER,
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 4096)
    hf.require("kv_channels", found.head_width, "another name of head_dim")
    hf.take("pretraining_tp", 1)  # its slices of a matrix product give the same sums
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions, partial=0.5)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, act="relu2", gated=False, bias=hf.flag("mlp_bias", False)),
        norm=Norm(kind="layer", eps=hf.number("norm_eps", 1e-5), weight="one_plus", bias=True),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


NEMOTRON = Family(
    model_type="nemotron",
    models="Nemotron, Minitron",
    unlike="LayerNorm1P, squared ReLU",
    read=_read,
    name_tensors=NAMES.rules,
)

"""Gemma, the first. HF model_type "gemma".

Source: Gemma Team 2024, arXiv:2403.08295; transformers 5.23, models/gemma.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_LAYER,
    LLAMA_OUTSIDE,
    attention,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
)
from ardor.families.family import ACTS, Family
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
# The first files said "gelu", but the weights were trained with the tanh form.
_ACTS = {**ACTS, "gelu": ACTS["gelu_pytorch_tanh"]}


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=16, head_width=256)
    max_positions = hf.count("max_position_embeddings", 8192)
    hf.require("use_bidirectional_attention", False, "a position never reads what follows it")
    hf.require("hidden_activation", "gelu_pytorch_tanh", "hidden_act decides")
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, act="gelu_pytorch_tanh", acts=_ACTS),
        norm=rms(hf, weight="one_plus", late_cast=True),
    )
    return read_decoder(
        hf,
        found,
        layer,
        max_positions=max_positions,
        tied=True,
        embed_scale=found.width**0.5,
    )


GEMMA = Family(
    model_type="gemma",
    models="Gemma 1",
    unlike="1 + w norms, scaled embedding",
    read=_read,
    name_tensors=NAMES.rules,
)

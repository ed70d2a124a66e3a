"""Llama 1 to 3.3, TinyLlama, SmolLM and all that copied them. HF model_type "llama".

Source: Touvron et al. 2023, arXiv:2302.13971; transformers 5.23, models/llama.
"""

from typing import Any

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
    uniform,
    write_llama,
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
    max_positions = hf.count("max_position_embeddings", 2048)
    hf.require("rope_interleaved", False, "channels turn in two halves")
    hf.require("sliding_window", None, "every layer reads all positions")
    # Its slices of a matrix product give the same sums; transformers 5 no longer reads it.
    hf.take("pretraining_tp", 1)
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, bias=hf.flag("mlp_bias", False)),
        norm=rms(hf),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


def _write(spec: Decoder) -> dict[str, Any]:
    mixer, ffn, _ = uniform(spec, "llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": ffn.bias,
        **write_llama(spec, "llama"),
    }


LLAMA = Family(
    model_type="llama",
    models="Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2",
    read=_read,
    name_tensors=NAMES.rules,
    write=_write,
)

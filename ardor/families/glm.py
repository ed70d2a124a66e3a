"""GLM-4 and GLM-4-0414. HF model_types "glm" and "glm4", which adds norms of what layers give.

Source: GLM Team 2024, arXiv:2406.12793; transformers 5.23, models/glm and glm4.
"""

from dataclasses import replace

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
from ardor.families.names import Joined, Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "mixer_out_norm": "post_self_attn_layernorm",
        "ffn_norm": "post_attention_layernorm",
        ("ffn.gate_proj", "ffn.up_proj"): Joined("mlp.gate_up_proj"),
        "ffn.down_proj": "mlp.down_proj",
        "ffn_out_norm": "post_mlp_layernorm",
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=2, head_width=128)
    max_positions = hf.count("max_position_embeddings", 131_072)
    rope = read_rope(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        pairing="neighbours",
        partial=0.5,
    )
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=hf.flag("attention_bias", True)),
        ffn=read_mlp(hf),
        norm=rms(hf, 1.5625e-7),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


def _read_glm4(hf: HFConfig) -> Decoder:
    spec = _read(hf)
    layers = tuple(replace(layer, placement="sandwich") for layer in spec.layers)
    return replace(spec, layers=layers)


GLM = Family(
    model_type="glm",
    models="GLM-4 9B",
    unlike="half rotation of neighbours, fused maps",
    read=_read,
    name_tensors=NAMES.rules,
)
GLM4 = Family(
    model_type="glm4",
    models="GLM-4 0414",
    unlike="as `glm`, with sandwich norms",
    read=_read_glm4,
    name_tensors=NAMES.rules,
)

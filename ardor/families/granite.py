"""Granite 3, the dense ones. HF model_type "granite".

Source: Granite Team 2024, "Granite 3.0 Language Models"; transformers 5.23, models/granite.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import attention, read_decoder, read_heads, read_mlp, rms
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


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
        ffn=read_mlp(hf, bias=hf.flag("mlp_bias", False)),
        norm=rms(hf),
        residual_scale=hf.number("residual_multiplier", 1.0),
    )
    return read_decoder(
        hf,
        found,
        layer,
        max_positions=max_positions,
        embed_scale=hf.number("embedding_multiplier", 1.0),
        embed_scale_rounded=False,
        logit_scale=1 / hf.number("logits_scaling", 1.0),
    )


GRANITE = Family(
    model_type="granite",
    models="Granite 3",
    unlike="multipliers",
    read=_read,
    name_tensors=NAMES.rules,
)

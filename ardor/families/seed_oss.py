"""Seed-OSS. HF model_type "seed_oss".

Source: ByteDance Seed Team 2025, "Seed-OSS Open-Source Models"; transformers 5.23, models/seed_oss.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import attention, read_decoder, read_heads, read_mlp, rms
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8, head_width=128)
    max_positions = hf.count("max_position_embeddings", 524288)
    hf.take("pretraining_tp", None)  # read nowhere
    hf.take("residual_dropout", None)  # acts only in training, where Ardor uses none
    mixer = attention(
        found,
        read_rope(hf, head_width=found.head_width, max_positions=max_positions),
        qkv_bias=hf.flag("attention_bias", True),
        out_bias=hf.flag("attention_out_bias", False),
    )
    ffn = read_mlp(hf, bias=hf.flag("mlp_bias", False))
    layer = Layer(mixer=mixer, ffn=ffn, norm=rms(hf))
    return read_decoder(hf, found, layer, max_positions=max_positions)


SEED_OSS = Family(
    model_type="seed_oss", models="Seed-OSS", unlike="biases", read=_read, name_tensors=NAMES.rules
)

"""Arcee's foundation models: a Llama whose feed-forward is not gated. HF model_type "arcee".

Source: Arcee AI 2025, "AFM-4.5B"; squared relu: So et al. 2021, arXiv:2109.08668; transformers
5.23, models/arcee.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import attention, read_decoder, read_heads, read_mlp, rms
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 4096)
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, act="relu2", gated=False, bias=hf.flag("mlp_bias", False)),
        norm=rms(hf, 1e-5),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


ARCEE = Family(
    model_type="arcee", models="AFM", unlike="squared ReLU", read=_read, name_tensors=NAMES.rules
)

"""Mixtral. HF model_type "mixtral".

Source: Jiang et al. 2024, arXiv:2401.04088; transformers 5.23, models/mixtral.
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
        "ffn.router": ("block_sparse_moe.gate", "mlp.gate"),
        **expert_places("block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8)
    max_positions = hf.count("max_position_embeddings", 131072)
    hf.take("router_jitter_noise", 0.0)  # in training alone, where Ardor adds no noise
    window = None if hf.take("sliding_window", None) is None else hf.count("sliding_window")
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions, theta=1e6)
    layer = Layer(
        mixer=attention(found, rope, window=window),
        ffn=read_experts(hf, read_mlp(hf), count=8, per_token=2, renormalise=True),
        norm=rms(hf, 1e-5),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions, balance=read_balance(hf))


MIXTRAL = Family(
    model_type="mixtral", models="Mixtral", unlike="experts", read=_read, name_tensors=NAMES.rules
)

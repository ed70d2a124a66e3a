"""OLMoE. HF model_type "olmoe".

Source: Muennighoff et al. 2024, arXiv:2409.02060; transformers 5.23, models/olmoe.
"""

from ardor.arch.spec import Decoder, Layer, QKNorm
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
        "ffn.router": "mlp.gate",
        **expert_places("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found, norm = read_heads(hf), rms(hf, 1e-5)
    max_positions = hf.count("max_position_embeddings", 4096)
    bias = hf.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            found,
            read_rope(hf, head_width=found.head_width, max_positions=max_positions),
            qk_norm=QKNorm(norm=norm, over="width"),
            # After the norm, as in transformers; published models do not clip.
            clip=hf.optional_number("clip_qkv"),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_experts(
            hf,
            read_mlp(hf),
            count=64,
            per_token=8,
            renormalise=hf.flag("norm_topk_prob", False),
        ),
        norm=norm,
    )
    balance = read_balance(hf, 0.01)
    return read_decoder(hf, found, layer, max_positions=max_positions, balance=balance)


OLMOE = Family(
    model_type="olmoe",
    models="OLMoE",
    unlike="experts, queries and keys normed over their width",
    read=_read,
    name_tensors=NAMES.rules,
)

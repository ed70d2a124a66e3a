"""StableLM 3B 4E1T, Zephyr, 2 1.6B and 2 12B. HF model_type "stablelm".

Source: Bellagente et al. 2024, arXiv:2402.17834; transformers 5.23, models/stablelm.
"""

from dataclasses import replace

from ardor.arch.spec import Decoder, Layer, Norm, QKNorm
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
from ardor.families.names import Names, PerExpert
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        **LLAMA_LAYER,
        "mixer.q_norm": PerExpert("self_attn.q_layernorm.norms.{}"),  # one per head
        "mixer.k_norm": PerExpert("self_attn.k_layernorm.norms.{}"),
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=32)
    hf.require(
        "head_dim", found.width // found.heads, "the heads of this family fill the model's width"
    )
    max_positions = hf.count("max_position_embeddings", 4096)
    norm = Norm(kind="layer", eps=hf.number("layer_norm_eps", 1e-5), bias=True)
    by_head = QKNorm(norm=replace(norm, bias=False), over="heads")
    layer = Layer(
        mixer=attention(
            found,
            read_rope(hf, head_width=found.head_width, max_positions=max_positions, partial=0.25),
            qk_norm=by_head if hf.flag("qk_layernorm", False) else None,
            qkv_bias=hf.flag("use_qkv_bias", False),
        ),
        ffn=read_mlp(hf),
        norm=norm,
        placement="parallel" if hf.flag("use_parallel_residual", False) else "pre",
    )
    return read_decoder(hf, found, layer, max_positions=max_positions)


STABLELM = Family(
    model_type="stablelm",
    models="StableLM 3B, 1.6B, 12B",
    unlike="LayerNorm, norms per head",
    read=_read,
    name_tensors=NAMES.rules,
)

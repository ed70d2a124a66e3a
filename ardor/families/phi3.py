"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini. HF model_type "phi3".

Source: arXiv:2404.14219; transformers 5.23, models/phi3.
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
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined("self_attn.qkv_proj"),
        ("ffn.gate_proj", "ffn.up_proj"): Joined("mlp.gate_up_proj"),
        **LLAMA_LAYER,
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 4096)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        hf.require(key, False, "the linear maps of this family have none")
    for key in ("full_attn_mod", "interpolate_factor"):
        hf.require(key, 1, "transformers knows no other, nor does any released file")
    rope = read_rope(
        hf,
        head_width=found.head_width,
        max_positions=max_positions,
        partial=1.0,
        original=4096,
        # What early files call it; "su" transformers 5.23 itself no longer reads, unless the
        # object repeats original_max_position_embeddings.
        aliases={"su": "longrope", "yarn": "longrope"},
    )
    window = hf.optional_count("sliding_window")
    layer = Layer(mixer=attention(found, rope, window=window), ffn=read_mlp(hf), norm=rms(hf, 1e-5))
    return read_decoder(hf, found, layer, max_positions=max_positions)


PHI3 = Family(
    model_type="phi3",
    models="Phi-3, 3.5, 4, 4-mini",
    unlike="fused maps, LongRoPE",
    read=_read,
    name_tensors=NAMES.rules,
    code=("configuration_phi3", "modeling_phi3"),
)

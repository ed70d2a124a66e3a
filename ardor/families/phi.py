"""Phi 1, 1.5 and 2. HF model_type "phi".

Source: Li et al. 2023, arXiv:2309.05463; transformers 5.23, models/phi.
"""

from ardor.arch.spec import Decoder, Layer, Norm, QKNorm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    attention,
    read_decoder,
    read_heads,
    read_mlp,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import Names
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        "mixer.q_proj": "self_attn.q_proj",
        "mixer.k_proj": "self_attn.k_proj",
        "mixer.v_proj": "self_attn.v_proj",
        "mixer.q_norm": "self_attn.q_layernorm",
        "mixer.k_norm": "self_attn.k_layernorm",
        "mixer.o_proj": "self_attn.dense",
        "ffn.up_proj": "mlp.fc1",
        "ffn.down_proj": "mlp.fc2",
    },
    outside={
        "embed_tokens": "model.embed_tokens",
        "norm": "model.final_layernorm",
        "lm_head": "lm_head",
    },
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf)
    max_positions = hf.count("max_position_embeddings", 2048)
    hf.require("tie_word_embeddings", False, "its head has a bias, which the embedding lacks")
    norm = Norm(kind="layer", eps=hf.number("layer_norm_eps", 1e-5), bias=True)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions, partial=0.5)
    layer = Layer(
        mixer=attention(
            found,
            rope,
            qk_norm=QKNorm(norm=norm) if hf.flag("qk_layernorm", False) else None,
            qkv_bias=True,
            out_bias=True,
        ),
        ffn=read_mlp(hf, act="gelu_new", gated=False, bias=True),
        norm=norm,
        placement="parallel",
    )
    return read_decoder(hf, found, layer, max_positions=max_positions, head_bias=True)


PHI = Family(
    model_type="phi",
    models="Phi-1, 1.5, 2",
    unlike="parallel, partial rotation, biases",
    read=_read,
    name_tensors=NAMES.rules,
)

"""StarCoder 2. HF model_type "starcoder2".

Source: Lozhkov et al. 2024, arXiv:2402.19173; transformers 5.23, models/starcoder2.
"""

from ardor.arch.spec import Decoder, Layer, Norm
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_OUTSIDE,
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
        **LLAMA_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=2)
    max_positions = hf.count("max_position_embeddings", 4096)
    hf.require("mlp_type", "default", "its feed-forward is not gated")
    hf.require("norm_type", "layer_norm", "its norms are layer norms")
    hf.require("scale_attn_weights", True, "scores are divided by the root of the head width")
    hf.take("layer_norm_epsilon", None)  # norm_epsilon decides
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        hf.take(key, None)  # our scores are float32 or more, whatever comes in
    for key in ("residual_dropout", "embedding_dropout"):
        hf.take(key, None)  # acts only in training
    window = hf.take("sliding_window", None)
    bias = hf.flag("use_bias", True)
    layer = Layer(
        mixer=attention(
            found,
            read_rope(hf, head_width=found.head_width, max_positions=max_positions),
            window=None if window is None else hf.count("sliding_window"),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_mlp(hf, act="gelu_pytorch_tanh", gated=False, bias=bias),
        norm=Norm(kind="layer", eps=hf.number("norm_epsilon", 1e-5), bias=True),
    )
    return read_decoder(hf, found, layer, max_positions=max_positions, tied=True)


STARCODER2 = Family(
    model_type="starcoder2",
    models="StarCoder 2",
    unlike="LayerNorm, biases, windows",
    read=_read,
    name_tensors=NAMES.rules,
)

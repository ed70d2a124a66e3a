"""Gemma 2. HF model_type "gemma2".

Source: Gemma Team 2024, arXiv:2408.00118; transformers 5.23, models/gemma2.
"""

from ardor.arch.spec import Decoder, Layer
from ardor.families.blocks import (
    INVERSE_FREQUENCIES,
    LLAMA_ATTENTION,
    LLAMA_MLP,
    LLAMA_OUTSIDE,
    attention,
    layers_by_type,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
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
        "mixer_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        **LLAMA_MLP,
        "ffn_out_norm": "post_feedforward_layernorm",
    },
    outside=LLAMA_OUTSIDE,
    ignorable=(INVERSE_FREQUENCIES,),
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=4, head_width=256)
    max_positions = hf.count("max_position_embeddings", 8192)
    hf.take("hidden_act", None)  # hidden_activation decides
    hf.require("use_bidirectional_attention", False, "a position never reads what follows it")
    bias = hf.flag("attention_bias", False)
    layer = Layer(
        mixer=attention(
            found,
            read_rope(hf, head_width=found.head_width, max_positions=max_positions),
            scale=hf.number("query_pre_attn_scalar", 256.0) ** -0.5,
            softcap=hf.optional_number("attn_logit_softcapping", 50.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=read_mlp(hf, act_key="hidden_activation", act="gelu_pytorch_tanh"),
        norm=rms(hf, weight="one_plus", late_cast=True),
        placement="sandwich",
    )
    return read_decoder(
        hf,
        found,
        layers_by_type(hf, layer, hf.optional_count("sliding_window", 4096), lambda i: i % 2 == 0),
        max_positions=max_positions,
        tied=True,
        embed_scale=found.width**0.5,
        logit_softcap=hf.optional_number("final_logit_softcapping", 30.0),
    )


GEMMA2 = Family(
    model_type="gemma2",
    models="Gemma 2",
    unlike="1 + w sandwich norms, caps, windows",
    read=_read,
    name_tensors=NAMES.rules,
)

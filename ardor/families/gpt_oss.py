"""gpt-oss 20b and 120b. HF model_type "gpt_oss".

Its experts come as bfloat16 or, as published, in MXFP4: which of them, the files tell.

Source: OpenAI 2025, arXiv:2508.10925; transformers 5.23, models/gpt_oss.
"""

import math
from dataclasses import replace

from ardor.arch.spec import Decoder, Experts, Layer, Mlp, Rope, Router, YarnScaling
from ardor.families.blocks import (
    LLAMA_ATTENTION,
    LLAMA_OUTSIDE,
    attention,
    layers_by_type,
    read_decoder,
    read_heads,
    rms,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.names import AllExperts, Names, PackedExperts
from ardor.families.rope import read_rope

NAMES = Names(
    prefix="model.",
    layer="model.layers.{}.",
    modules={
        "mixer_norm": "input_layernorm",
        **LLAMA_ATTENTION,
        "mixer.sinks": "self_attn.sinks",
        "ffn_norm": "post_attention_layernorm",
        "ffn.router": "mlp.router",
        ("ffn.experts.gate_proj", "ffn.experts.up_proj"): (
            AllExperts("mlp.experts.gate_up_proj", order="rows", transposed=True),
            PackedExperts("mlp.experts.gate_up_proj", order="rows"),
        ),
        "ffn.experts.down_proj": (
            AllExperts("mlp.experts.down_proj", transposed=True),
            PackedExperts("mlp.experts.down_proj"),
        ),
    },
    outside=LLAMA_OUTSIDE,
)

# Where config.json says nothing of the rotation, transformers takes that of the published models.
_UNSAID = YarnScaling(
    factor=32.0,
    original_positions=4096,
    truncate=False,
    attention_factor=0.1 * math.log(32.0) + 1.0,
)


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=8, head_width=64)
    max_positions = hf.count("max_position_embeddings", 131072)
    hf.require("swiglu_alpha", 1.702, "the gate's sigmoid has that slope")
    for key in (
        "hidden_act",  # the gate is what it is, whatever stands here
        "router_aux_loss_coef",  # training
        "output_router_logits",
        "experts_per_token",  # OpenAI's names of num_experts_per_tok
        "initial_context_length",  # and of the rotation's original_max_position_embeddings
    ):
        hf.take(key, None)
    bias = hf.flag("attention_bias", True)
    ffn = Experts(
        count=hf.count("num_local_experts", 128),
        expert=Mlp(
            width=hf.count("intermediate_size"),
            act="quick_gelu",
            bias=True,
            limit=hf.number("swiglu_limit", 7.0),
            shift=1.0,
        ),
        router=Router(per_token=hf.count("num_experts_per_tok", 4), score="chosen", bias=True),
    )
    layer = Layer(
        mixer=attention(
            found,
            _rope(hf, found.head_width, max_positions),
            sinks=True,
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=ffn,
        norm=rms(hf, 1e-5, late_cast=True),
    )
    window = hf.optional_count("sliding_window", 128)
    layers = layers_by_type(hf, layer, window, lambda i: i % 2 == 0)
    return read_decoder(hf, found, layers, max_positions=max_positions)


def _rope(hf: HFConfig, head_width: int, max_positions: int) -> Rope:
    unsaid = not hf.raw.get("rope_parameters") and not hf.raw.get("rope_scaling")
    rope = read_rope(hf, head_width=head_width, max_positions=max_positions, theta=150_000.0)
    return replace(rope, scaling=_UNSAID) if unsaid else rope


GPT_OSS = Family(
    model_type="gpt_oss",
    models="gpt-oss 20b, 120b",
    unlike="sinks, windows, experts in bfloat16 or MXFP4",
    read=_read,
    name_tensors=NAMES.rules,
    packed=("mxfp4",),
)

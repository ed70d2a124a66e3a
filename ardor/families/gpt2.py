"""GPT-2 and its descendants of the same code (DistilGPT2, DialoGPT). HF model_type "gpt2".

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; transformers
5.23, models/gpt2.
"""

from dataclasses import replace
from typing import Any

from ardor.arch.spec import Attention, Decoder, Layer, Mlp, Norm
from ardor.errors import ConfigError
from ardor.families.blocks import CAUSAL_MASKS, uniform
from ardor.families.family import ACTS, Family, act_name
from ardor.families.hf_config import HFConfig
from ardor.families.names import Joined, Names


def _read(hf: HFConfig) -> Decoder:
    width, heads = hf.count("n_embd"), hf.count("n_head")
    if width % heads:
        raise ConfigError(f"{hf.path}: n_embd={width} is not a multiple of n_head={heads}")
    hf.take("n_ctx", None)  # an older name of n_positions, which decides
    # Our scores are float32 or more, whatever comes in: that is what this flag asks for.
    hf.flag("reorder_and_upcast_attn", False)
    norm = Norm(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5), bias=True)
    mixer = Attention(
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        scale=(width // heads) ** -0.5 if hf.flag("scale_attn_weights", True) else 1.0,
        rope=None,
        qkv_bias=True,
        out_bias=True,
    )
    ffn = Mlp(
        width=hf.count("n_inner", 4 * width),
        act=hf.choice("activation_function", ACTS, "gelu_new"),
        gated=False,
        bias=True,
    )
    by_layer = hf.flag("scale_attn_by_inverse_layer_idx", False)
    scales = [mixer.scale / (i + 1 if by_layer else 1) for i in range(hf.count("n_layer"))]
    return Decoder(
        vocab=hf.count("vocab_size"),
        width=width,
        layers=tuple(
            Layer(mixer=replace(mixer, scale=scale), ffn=ffn, norm=norm) for scale in scales
        ),
        norm=norm,
        tied=hf.flag("tie_word_embeddings", True),
        max_positions=hf.count("n_positions"),
        learned_positions=True,
    )


def _write(spec: Decoder) -> dict[str, Any]:
    mixer, ffn, norm = uniform(spec, "gpt2")
    act = act_name(ffn.act, "gpt2")
    return {
        "activation_function": "gelu_new" if act == "gelu_pytorch_tanh" else act,
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": norm.eps,
        "n_ctx": spec.max_positions,
        "n_embd": spec.width,
        "n_head": mixer.heads,
        "n_inner": ffn.width,
        "n_layer": len(spec.layers),
        "n_positions": spec.max_positions,
        "scale_attn_by_inverse_layer_idx": spec.layers[-1].mixer.scale != mixer.scale,
        "scale_attn_weights": mixer.scale == mixer.head_width**-0.5,
    }


NAMES = Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    modules={
        "mixer_norm": "ln_1",
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"): Joined("attn.c_attn"),
        "mixer.o_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    outside={
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    transposed=True,  # Conv1D keeps its weight as [in, out]
    ignorable=(CAUSAL_MASKS,),
)

GPT2 = Family(
    model_type="gpt2",
    models="GPT-2, DistilGPT2, DialoGPT",
    unlike="learned positions, fused Conv1D",
    read=_read,
    name_tensors=NAMES.rules,
    write=_write,
)

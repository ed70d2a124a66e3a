"""GPT-2 and its descendants of the same code (DistilGPT2, DialoGPT). HF model_type "gpt2".

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; transformers
5.23, models/gpt2.
"""

from dataclasses import replace
from itertools import chain
from typing import Any

from ardor.arch.spec import Attention, Decoder, Layer, Mlp, Norm
from ardor.errors import ConfigError
from ardor.families.family import ACT_NAMES, ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Ignorable, Rule, Rules, weight


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
    first, last = spec.layers[0], spec.layers[-1]
    act = ACT_NAMES[first.ffn.act]
    return {
        "activation_function": "gelu_new" if act == "gelu_pytorch_tanh" else act,
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": spec.norm.eps,
        "n_ctx": spec.max_positions,
        "n_embd": spec.width,
        "n_head": first.mixer.heads,
        "n_inner": first.ffn.width,
        "n_layer": len(spec.layers),
        "n_positions": spec.max_positions,
        "scale_attn_by_inverse_layer_idx": last.mixer.scale != first.mixer.scale,
        "scale_attn_weights": first.mixer.scale == first.mixer.head_width**-0.5,
    }


def _layer(i: int) -> tuple[Rule, ...]:
    disk, memory = f"transformer.h.{i}", f"layers.{i}"
    qkv = [f"{memory}.mixer.{name}_proj" for name in "qkv"]
    linear = {"bias": True, "transposed": True}  # Conv1D keeps its weight as [in, out]
    return (
        *weight(f"{disk}.ln_1", f"{memory}.mixer_norm", bias=True),
        *weight(f"{disk}.attn.c_attn", *qkv, **linear),
        *weight(f"{disk}.attn.c_proj", f"{memory}.mixer.o_proj", **linear),
        *weight(f"{disk}.ln_2", f"{memory}.ffn_norm", bias=True),
        *weight(f"{disk}.mlp.c_fc", f"{memory}.ffn.up_proj", **linear),
        *weight(f"{disk}.mlp.c_proj", f"{memory}.ffn.down_proj", **linear),
    )


def _name_tensors(spec: Decoder) -> Rules:
    return Rules(
        prefix="transformer.",
        rules=(
            *weight("transformer.wte", "embed_tokens"),
            *weight("transformer.wpe", "embed_positions"),
            *chain.from_iterable(_layer(i) for i in range(len(spec.layers))),
            *weight("transformer.ln_f", "norm", bias=True),
            *(() if spec.tied else weight("lm_head", "lm_head")),
        ),
        tied_head=Rule("lm_head.weight", ("embed_tokens.weight",)) if spec.tied else None,
        ignorable=(
            Ignorable(
                pattern=r"h\.\d+\.attn\.(bias|masked_bias)",
                reason="the causal mask as a buffer; files of the hub hold it",
            ),
        ),
    )


GPT2 = Family(model_type="gpt2", read=_read, name_tensors=_name_tensors, write=_write)

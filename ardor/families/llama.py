"""Llama 1 to 3.3, TinyLlama, SmolLM and all that copied them. HF model_type "llama".

Source: Touvron et al. 2023, arXiv:2302.13971; transformers 5.23, models/llama.
"""

from itertools import chain
from typing import Any

from ardor.arch.spec import Attention, Decoder, Layer, Mlp, Norm
from ardor.errors import ConfigError
from ardor.families.family import ACT_NAMES, ACTS, Family
from ardor.families.hf_config import HFConfig
from ardor.families.rope import read_rope, write_rope
from ardor.families.rules import Ignorable, Rule, Rules, weight


def _read(hf: HFConfig) -> Decoder:
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    kv_heads = hf.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{hf.path}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if hf.take("head_dim", None) is None and width % heads:
        raise ConfigError(
            f"{hf.path}: hidden_size={width} is not a multiple of num_attention_heads={heads}, "
            "and there is no head_dim"
        )
    head_width = hf.count("head_dim", width // heads)
    if head_width % 2:
        raise ConfigError(f"{hf.path}: a head of odd width {head_width} cannot be rotated")
    max_positions = hf.count("max_position_embeddings", 2048)
    hf.require("rope_interleaved", False, "channels turn in two halves")
    hf.require("sliding_window", None, "every layer reads all positions")
    # Its slices of a matrix product give the same sums; transformers 5 no longer reads it.
    hf.take("pretraining_tp", 1)
    bias = hf.flag("attention_bias", False)
    norm = Norm(kind="rms", eps=hf.number("rms_norm_eps", 1e-6))
    layer = Layer(
        mixer=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            scale=head_width**-0.5,
            rope=read_rope(hf, head_width=head_width, max_positions=max_positions),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=Mlp(
            width=hf.count("intermediate_size"),
            act=hf.choice("hidden_act", ACTS, "silu"),
            bias=hf.flag("mlp_bias", False),
        ),
        norm=norm,
    )
    return Decoder(
        vocab=hf.count("vocab_size"),
        width=width,
        layers=(layer,) * hf.count("num_hidden_layers"),
        norm=norm,
        tied=hf.flag("tie_word_embeddings", False),
        max_positions=max_positions,
    )


def _write(spec: Decoder) -> dict[str, Any]:
    layer = spec.layers[0]
    if layer.mixer.rope is None:
        raise ConfigError("a llama has rotary positions; give its attention a rope")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": layer.mixer.qkv_bias,
        "head_dim": layer.mixer.head_width,
        "hidden_act": ACT_NAMES[layer.ffn.act],
        "hidden_size": spec.width,
        "intermediate_size": layer.ffn.width,
        "max_position_embeddings": spec.max_positions,
        "mlp_bias": layer.ffn.bias,
        "num_attention_heads": layer.mixer.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": layer.mixer.kv_heads,
        "rms_norm_eps": spec.norm.eps,
        **write_rope(layer.mixer.rope),
    }


def _layer(i: int, layer: Layer) -> tuple[Rule, ...]:
    disk, memory = f"model.layers.{i}", f"layers.{i}"
    qkv, out, ffn = layer.mixer.qkv_bias, layer.mixer.out_bias, layer.ffn.bias
    return (
        *weight(f"{disk}.input_layernorm", f"{memory}.mixer_norm"),
        *weight(f"{disk}.self_attn.q_proj", f"{memory}.mixer.q_proj", bias=qkv),
        *weight(f"{disk}.self_attn.k_proj", f"{memory}.mixer.k_proj", bias=qkv),
        *weight(f"{disk}.self_attn.v_proj", f"{memory}.mixer.v_proj", bias=qkv),
        *weight(f"{disk}.self_attn.o_proj", f"{memory}.mixer.o_proj", bias=out),
        *weight(f"{disk}.post_attention_layernorm", f"{memory}.ffn_norm"),
        *weight(f"{disk}.mlp.gate_proj", f"{memory}.ffn.gate_proj", bias=ffn),
        *weight(f"{disk}.mlp.up_proj", f"{memory}.ffn.up_proj", bias=ffn),
        *weight(f"{disk}.mlp.down_proj", f"{memory}.ffn.down_proj", bias=ffn),
    )


def _name_tensors(spec: Decoder) -> Rules:
    layers = (_layer(i, layer) for i, layer in enumerate(spec.layers))
    return Rules(
        prefix="model.",
        rules=(
            *weight("model.embed_tokens", "embed_tokens"),
            *chain.from_iterable(layers),
            *weight("model.norm", "norm"),
            *(() if spec.tied else weight("lm_head", "lm_head")),
        ),
        tied_head=Rule("lm_head.weight", ("embed_tokens.weight",)) if spec.tied else None,
        ignorable=(
            Ignorable(
                pattern=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
                reason="computed from rope_theta; files from before transformers 4.31 hold it",
            ),
        ),
    )


LLAMA = Family(model_type="llama", read=_read, name_tensors=_name_tensors, write=_write)

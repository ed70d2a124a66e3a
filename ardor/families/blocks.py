"""What most families share: how a config.json tells of heads, widths and layers.

Each function reads the keys that nearly all families use, with their checks; a family passes what
it does otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ardor.arch.spec import Act, Attention, Decoder, Layer, Mlp, Norm, Rope
from ardor.errors import ConfigError
from ardor.families.family import ACTS, act_name
from ardor.families.hf_config import HFConfig
from ardor.families.names import Table
from ardor.families.rope import write_rope
from ardor.families.rules import Ignorable


class Heads(NamedTuple):
    width: int  # of the model
    heads: int
    kv_heads: int
    head_width: int


def read_heads(
    hf: HFConfig, *, kv_heads: int | None = None, head_width: int | None = None
) -> Heads:
    """The widths of attention; what is passed are the family's defaults where the file is silent.

    A null there is not silence: it asks for as many kv heads as heads, and for width / heads.

    Raises: ConfigError if they do not divide as they must.
    """
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    kv_heads = None if "num_key_value_heads" in hf.raw else kv_heads
    head_width = None if "head_dim" in hf.raw else head_width
    shared = hf.count("num_key_value_heads", kv_heads or heads)
    if heads % shared:
        raise ConfigError(
            f"{hf.path}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={shared}; correct one of them"
        )
    if hf.take("head_dim", head_width) is None and width % heads:
        raise ConfigError(
            f"{hf.path}: hidden_size={width} is not a multiple of num_attention_heads={heads}, "
            "and there is no head_dim"
        )
    return Heads(width, heads, shared, hf.count("head_dim", head_width or width // heads))


def read_plain_heads(
    hf: HFConfig, *, width_key: str = "hidden_size", heads_key: str = "num_attention_heads"
) -> Heads:
    """The widths of attention whose heads fill the model, each with keys and values of its own.

    Raises: ConfigError if they do not divide, or the file says otherwise.
    """
    width, heads = hf.count(width_key), hf.count(heads_key)
    if width % heads:
        raise ConfigError(
            f"{hf.path}: {width_key}={width} is not a multiple of {heads_key}={heads}"
        )
    hf.require("num_key_value_heads", heads, "no heads of this family share keys and values")
    hf.require("head_dim", width // heads, "the heads of this family fill the model's width")
    return Heads(width, heads, heads, width // heads)


def attention(found: Heads, rope: Rope | None, **keys: Any) -> Attention:
    """Grouped attention scaled by 1 / sqrt(head width); `keys` are further fields of its spec."""
    chosen: dict[str, Any] = {"scale": found.head_width**-0.5, **keys}
    return Attention(
        heads=found.heads,
        kv_heads=found.kv_heads,
        head_width=found.head_width,
        rope=rope,
        **chosen,
    )


def read_mlp(
    hf: HFConfig,
    *,
    act: str = "silu",
    act_key: str = "hidden_act",
    acts: Mapping[str, Act] = ACTS,
    **keys: Any,
) -> Mlp:
    """The feed-forward of `intermediate_size`, gated unless `keys` say otherwise."""
    return Mlp(width=hf.count("intermediate_size"), act=hf.choice(act_key, acts, act), **keys)


def read_decoder(
    hf: HFConfig,
    found: Heads,
    layers: "Layer | tuple[Layer, ...]",
    *,
    max_positions: int,
    tied: bool = False,
    **keys: Any,
) -> Decoder:
    """The whole, with a final norm like those of its layers; `tied` is the family's default."""
    count = hf.count("num_hidden_layers")
    layers = (layers,) * count if isinstance(layers, Layer) else layers
    assert len(layers) == count
    chosen: dict[str, Any] = {"norm": layers[0].norm, **keys}
    return Decoder(
        vocab=hf.count("vocab_size"),
        width=found.width,
        layers=layers,
        tied=hf.flag("tie_word_embeddings", tied),
        max_positions=max_positions,
        **chosen,
    )


def rms(hf: HFConfig, default: float = 1e-6, **keys: Any) -> Norm:
    """The root-mean-square norm of `rms_norm_eps`."""
    return Norm(kind="rms", eps=hf.number("rms_norm_eps", default), **keys)


def read_layer_types(
    hf: HFConfig, sliding: Callable[[int], bool], local: str = "sliding_attention"
) -> tuple[str, ...]:
    """`layer_types`, one per layer; where the file is silent, as `sliding` says of each index.

    `local` is the kind of those that do not read everything.

    Raises: ConfigError for another kind or a wrong number of them.
    """
    count, known = hf.count("num_hidden_layers"), ("full_attention", local)
    found = hf.take("layer_types", [known[sliding(i)] for i in range(count)])
    if not isinstance(found, list) or len(found) != count:
        raise ConfigError(f"{hf.path}: layer_types={found!r} is not a list of {count} kinds")
    if other := sorted({str(kind) for kind in found} - {*known}):
        raise ConfigError(
            f"{hf.path}: layer_types has {', '.join(other)}; expected {' | '.join(known)}"
        )
    return tuple(found)


def layers_by_type(
    hf: HFConfig, layer: Layer, window: int | None, sliding: Callable[[int], bool]
) -> tuple[Layer, ...]:
    """The same layer for each of `layer_types`, with the window in those that slide.

    Raises: ConfigError if one slides and there is no window.
    """
    windows = read_windows(hf, read_layer_types(hf, sliding), window)
    return tuple(with_attention(layer, window=window) for window in windows)


def read_windows(
    hf: HFConfig, kinds: tuple[str, ...], window: int | None
) -> tuple[int | None, ...]:
    """The window of each layer: `window` on those whose kind says that they slide.

    Raises: ConfigError if one slides and there is no window.
    """
    if window is None and "sliding_attention" in kinds:
        raise ConfigError(
            f"{hf.path}: layer_types has sliding_attention, but no window is in use; "
            "set sliding_window, and use_sliding_window where the family has it"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def with_attention(layer: Layer, **keys: Any) -> Layer:
    """The same layer with other values of its attention."""
    assert isinstance(layer.mixer, Attention)
    return replace(layer, mixer=replace(layer.mixer, **keys))


class Uniform(NamedTuple):
    """The parts of a decoder whose layers are all alike: attention, an MLP, a final norm."""

    mixer: Attention
    ffn: Mlp
    norm: Norm


def uniform(spec: Decoder, family: str) -> Uniform:
    """The parts of `spec`, to be written as a config.json.

    Raises: ConfigError if it has others.
    """
    layer = spec.layers[0]
    mixer, ffn, norm = layer.mixer, layer.ffn, spec.norm
    if not isinstance(mixer, Attention) or not isinstance(ffn, Mlp) or norm is None:
        raise ConfigError(f"the {family} family cannot express {layer}")
    return Uniform(mixer, ffn, norm)


def write_llama(spec: Decoder, family: str) -> dict[str, Any]:
    """The keys that Llama's config.json has, and most took over; without its flags for biases.

    Raises: ConfigError if the layers have other parts.
    """
    mixer, ffn, norm = uniform(spec, family)
    if mixer.rope is None:
        raise ConfigError(f"a {family} has rotary positions; give its attention a rope")
    return {
        "head_dim": mixer.head_width,
        "hidden_act": act_name(ffn.act, family),
        "hidden_size": spec.width,
        "intermediate_size": ffn.width,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": mixer.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": mixer.kv_heads,
        "rms_norm_eps": norm.eps,
        **write_rope(mixer.rope),
    }


def write_layer_types(spec: Decoder) -> dict[str, Any]:
    """`layer_types` and the window of those that slide; one window at most can be written."""
    mixers = [layer.mixer for layer in spec.layers]
    windows = [mixer.window if isinstance(mixer, Attention) else None for mixer in mixers]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        "layer_types": kinds,
        "sliding_window": next((window for window in windows if window is not None), None),
    }


INVERSE_FREQUENCIES = Ignorable(
    pattern=r"(layers\.\d+\.(self_attn|attention)\.)?rotary_emb\.inv_freq",
    reason="computed from rope_theta; files from before transformers 4.31 hold it",
)

CAUSAL_MASKS = Ignorable(
    pattern=r"(h\.\d+\.attn|layers\.\d+\.attention)\.(bias|masked_bias)",
    reason="the causal mask as a buffer; files of the hub hold it",
)

# The names that Llama gave and most took over.
LLAMA_ATTENTION: Table = {
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "mixer.o_proj": "self_attn.o_proj",
}
LLAMA_MLP: Table = {
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
LLAMA_LAYER: Table = {
    "mixer_norm": "input_layernorm",
    **LLAMA_ATTENTION,
    "ffn_norm": "post_attention_layernorm",
    **LLAMA_MLP,
}
LLAMA_OUTSIDE = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
}

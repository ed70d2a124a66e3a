"""SmolLM 3. HF model_type "smollm3".

Source: Hugging Face 2025, "SmolLM3: smol, multilingual, long-context reasoner"; layers that do not
turn: Yang et al. 2025, arXiv:2501.18795; transformers 5.23, models/smollm3.
"""

from dataclasses import replace

from ardor.arch.spec import Attention, Decoder, Layer
from ardor.errors import ConfigError
from ardor.families.blocks import (
    attention,
    layers_by_type,
    read_decoder,
    read_heads,
    read_mlp,
    rms,
)
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.llama import NAMES
from ardor.families.rope import read_rope


def _read(hf: HFConfig) -> Decoder:
    found = read_heads(hf, kv_heads=4)
    max_positions = hf.count("max_position_embeddings", 32768)
    hf.take("pretraining_tp", None)  # these two are left from other families, and read by none
    hf.take("max_window_layers", None)
    bias = hf.flag("attention_bias", False)
    rope = read_rope(hf, head_width=found.head_width, max_positions=max_positions, theta=2e6)
    layer = Layer(
        mixer=attention(found, rope, qkv_bias=bias, out_bias=bias),
        ffn=read_mlp(hf, bias=hf.flag("mlp_bias", False)),
        norm=rms(hf),
    )
    window = hf.optional_count("sliding_window")
    window = window if hf.flag("use_sliding_window", False) else None
    turning = _turning(hf)
    layers = layers_by_type(hf, layer, window, lambda i: window is not None and not turning[i])
    layers = tuple(
        layer if turns else _unturned(layer) for layer, turns in zip(layers, turning, strict=True)
    )
    return read_decoder(hf, found, layers, max_positions=max_positions, tied=True)


def _turning(hf: HFConfig) -> list[bool]:
    """Of each layer, whether it has rotary positions: what `no_rope_layers` says with a 1.

    Raises: ConfigError if that is not a list of 0 and 1, one for each layer at least.
    """
    count, interval = hf.count("num_hidden_layers"), hf.count("no_rope_layer_interval", 4)
    default = [int((index + 1) % interval != 0) for index in range(count)]
    found = hf.take("no_rope_layers", default)
    if not isinstance(found, list) or len(found) < count or any(x not in (0, 1) for x in found):
        raise ConfigError(
            f"{hf.path}: no_rope_layers={found!r} is not a list of {count} or more, each 0 or 1"
        )
    return [bool(turns) for turns in found[:count]]


def _unturned(layer: Layer) -> Layer:
    assert isinstance(layer.mixer, Attention)
    return replace(layer, mixer=replace(layer.mixer, rope=None))


SMOLLM3 = Family(
    model_type="smollm3",
    models="SmolLM 3",
    unlike="layers without rotation",
    read=_read,
    name_tensors=NAMES.rules,
)

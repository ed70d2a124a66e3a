"""Rotary positions as config.json writes them, in the form of transformers 5 or 4.

Source: transformers 5.23, modeling_rope_utils.py; YaRN: arXiv:2309.00071, section 3.4.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ardor.arch.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ProportionalScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig

_HARMLESS = {
    "finetuned": "says that the weights were trained with this scaling",
    "type": "an older name of rope_type, which wins where both are given",
}
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
_ALIASES = {"su": "longrope"}  # as Phi-3 was first published

LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(
    hf: HFConfig,
    *,
    head_width: int,
    max_positions: int,
    theta: float = 10_000.0,
    pairing: Literal["halves", "neighbours"] = "halves",
    partial: float | None = None,
    theta_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    original: int | None = None,
    aliases: Mapping[str, str] = _ALIASES,
    own: tuple[str, ...] = (),
    default: Mapping[str, Any] | None = None,
) -> Rope:
    """The rotation of a model whose layers all turn alike.

    Version 5 has everything in `rope_parameters`; version 4 has `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`, whose names some families change. A file may hold both, if they say the
    same. `theta` and `partial` are the family's defaults; partial None: its heads turn whole.
    `original` is its default for the `original_max_position_embeddings` beside the object, which
    wins over the one inside; `aliases` are its other names of kinds; `own` keys of the object it
    reads itself; and `default` is the object of a file without one.

    Raises: ConfigError for a kind of scaling we do not have, or two forms that disagree.
    """
    theta = hf.number(theta_key, theta)
    partial = _partial(hf, partial_key, partial)
    original = hf.take("original_max_position_embeddings", original)
    plain = Rope(theta=theta, rotated=_rotated(hf, head_width, partial), pairing=pairing)
    sections = [hf.section(key) for key in ("rope_scaling", "rope_parameters")]
    if default is not None and sections == [None, None]:
        sections = [HFConfig(default, path=hf.path)]
    ropes = []
    for section in sections:
        if section is not None:
            if original is not None:
                section.raw["original_max_position_embeddings"] = original
            for key in own:
                section.take(key, None)
            ropes.append(read_section(section, plain, head_width, max_positions, partial, aliases))
    return _agreed(hf, ropes, plain)


def read_layer_ropes(
    hf: HFConfig,
    *,
    head_width: int,
    max_positions: int,
    thetas: Mapping[str, tuple[str, float]],
) -> dict[str, Rope]:
    """The rotation of each of `LAYER_TYPES`, where they differ; heads turn whole.

    Version 5 has an object for each in `rope_parameters`. In version 4 `rope_scaling` is of full
    attention alone, and `thetas` says for each kind under which key its theta is, and the default.

    Raises: ConfigError for a kind of scaling we do not have, or two forms that disagree.
    """
    _partial(hf, "partial_rotary_factor", None)
    nested, scaling = hf.section("rope_parameters"), hf.section("rope_scaling")
    found = {}
    for kind in LAYER_TYPES:
        theta = hf.number(*thetas[kind])
        plain = Rope(theta=theta, rotated=_rotated(hf, head_width, None))
        sections = [
            scaling if kind == "full_attention" else None,
            None if nested is None else nested.section(kind),
        ]
        ropes = [
            read_section(section, plain, head_width, max_positions, None)
            for section in sections
            if section is not None
        ]
        found[kind] = _agreed(hf, ropes, plain)
    if nested is not None:
        nested.finish({})
    return found


def read_kind_rope(
    hf: HFConfig, kind: str, *, head_width: int, default: Mapping[str, Mapping[str, Any]]
) -> Rope:
    """The rotation of layers of one kind, for which `rope_parameters` has an object.

    `default` is what a file without any relies on, and names the kinds.

    Raises: ConfigError if there is no such object, or it is not read in full.
    """
    nested = hf.section("rope_parameters") or HFConfig(default, path=hf.path)
    sections = {name: nested.section(name) for name in default}
    nested.finish({})
    if (section := sections[kind]) is None:
        raise ConfigError(f"{nested.path}: no {kind!r}, which some layers are")
    plain = Rope(theta=10_000.0, rotated=_rotated(hf, head_width, None))
    return read_section(section, plain, head_width, hf.count("max_position_embeddings", 1), None)


def _agreed(hf: HFConfig, ropes: list[Rope], plain: Rope) -> Rope:
    """What the forms of a file say together; `plain` if it has none."""
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise ConfigError(
            f"{hf.path}: rope_scaling gives {ropes[0]}, but rope_parameters gives {ropes[1]}; "
            "remove the one that is wrong"
        )
    return ropes[0] if ropes else plain


def _partial(hf: HFConfig, key: str, default: float | None) -> float | None:
    if default is None:
        hf.require(key, 1.0, "the heads of this family turn whole")
        return None
    return hf.number(key, default)


def _rotated(hf: HFConfig, head_width: int, partial: float | None) -> int:
    if partial is None and head_width % 2:
        raise ConfigError(f"{hf.path}: a head of odd width {head_width} cannot be rotated")
    rotated = head_width if partial is None else int(head_width * partial)
    if rotated % 2 or not 0 < rotated <= head_width:
        raise ConfigError(
            f"{hf.path}: partial_rotary_factor={partial} of heads of width {head_width} is "
            f"{rotated} channels, which cannot be turned in pairs"
        )
    return rotated


def read_section(
    hf: HFConfig,
    plain: Rope,
    head_width: int,
    max_positions: int,
    partial: float | None,
    aliases: Mapping[str, str] = _ALIASES,
) -> Rope:
    """The rotation that one object of a config describes; `plain` is what it says nothing about.

    Raises: ConfigError for a kind of scaling we do not have, or a key that nothing reads.
    """
    older = hf.take("type", "default")  # of which rope_type is the newer name, and decides
    kind = hf.take("rope_type", older)
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    theta = hf.number("rope_theta", plain.theta)
    scaling: Scaling
    if kind == "proportional":
        # The whole head is rotated, most of it by nothing; `partial` is another key of that name.
        share, rotated = hf.number("partial_rotary_factor", 1.0), _rotated(hf, head_width, None)
        turning, factor = int(share * head_width // 2), hf.number("factor", 1.0)
        scaling = ProportionalScaling(turning=turning, factor=factor)
        hf.finish(_HARMLESS)
        return Rope(theta=theta, rotated=rotated, pairing=plain.pairing, scaling=scaling)
    partial = _partial(hf, "partial_rotary_factor", partial)
    rotated = _rotated(hf, head_width, partial)
    match kind:
        case "default":
            hf.take("original_max_position_embeddings", None)
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=hf.number("factor"))
        case "dynamic":
            hf.take("original_max_position_embeddings", None)
            scaling = DynamicScaling(factor=hf.number("factor"), original_positions=max_positions)
        case "llama3":
            scaling = Llama3Scaling(
                factor=hf.number("factor"),
                low_freq_factor=hf.number("low_freq_factor"),
                high_freq_factor=hf.number("high_freq_factor"),
                original_positions=hf.count("original_max_position_embeddings", max_positions),
            )
        case "yarn":
            scaling = _yarn(hf, max_positions)
        case "longrope":
            scaling = _long(hf, max_positions, rotated // 2)
        case _:
            raise ConfigError(
                f"{hf.path}: rope_type={kind!r} is not implemented; expected {' | '.join(_KINDS)}"
            )
    hf.finish(_HARMLESS)
    return Rope(theta=theta, rotated=rotated, pairing=plain.pairing, scaling=scaling)


def _long(hf: HFConfig, max_positions: int, pairs: int) -> LongScaling:
    original = hf.count("original_max_position_embeddings", max_positions)
    factor = hf.number("factor", max_positions / original)
    growth = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    amplitude = hf.number("attention_factor", growth)
    divisors = {}
    for key in ("short_factor", "long_factor"):
        values = hf.take(key)
        if not isinstance(values, list) or len(values) != pairs:
            found = len(values) if isinstance(values, list) else repr(values)
            raise ConfigError(f"{hf.path}: {key} has {found} numbers, expected {pairs}")
        divisors[key] = tuple(float(value) for value in values)
    return LongScaling(
        short=divisors["short_factor"],
        long=divisors["long_factor"],
        original_positions=original,
        short_amplitude=hf.number("short_mscale", amplitude),
        long_amplitude=hf.number("long_mscale", amplitude),
    )


def _yarn(hf: HFConfig, max_positions: int) -> YarnScaling:
    original = hf.count("original_max_position_embeddings", max_positions)
    factor = hf.number("factor", max_positions / original)
    numerator, denominator = hf.number("mscale", 0.0), hf.number("mscale_all_dim", 0.0)

    def growth(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    both = numerator and denominator
    default = growth(numerator) / growth(denominator) if both else growth(1.0)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        beta_fast=hf.number("beta_fast", 32.0) or 32.0,  # a zero means the default too
        beta_slow=hf.number("beta_slow", 1.0) or 1.0,
        truncate=hf.flag("truncate", True),
        attention_factor=hf.number("attention_factor", default),
    )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The keys of config.json for `rope`, in both forms: they say the same."""
    scaling: dict[str, Any] = {}
    match rope.scaling:
        case LinearScaling(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor=factor):
            scaling = {"rope_type": "dynamic", "factor": factor}
        case LongScaling() as long:
            scaling = {
                "rope_type": "longrope",
                "short_factor": list(long.short),
                "long_factor": list(long.long),
                "original_max_position_embeddings": long.original_positions,
                "short_mscale": long.short_amplitude,
                "long_mscale": long.long_amplitude,
            }
        case Llama3Scaling() as llama3:
            scaling = {
                "rope_type": "llama3",
                "factor": llama3.factor,
                "low_freq_factor": llama3.low_freq_factor,
                "high_freq_factor": llama3.high_freq_factor,
                "original_max_position_embeddings": llama3.original_positions,
            }
        case YarnScaling() as yarn:
            scaling = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_positions,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
                "attention_factor": yarn.attention_factor,
            }
    return {
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
    }

"""Rotary positions as config.json writes them, in the form of transformers 5 or 4.

Source: transformers 5.23, modeling_rope_utils.py; YaRN: arXiv:2309.00071, section 3.4.
"""

import math
from typing import Any

from ardor.arch.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling
from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig

_HARMLESS = {
    "finetuned": "says that the weights were trained with this scaling",
    "type": "an older name of rope_type, which wins where both are given",
}


def read_rope(hf: HFConfig, *, head_width: int, max_positions: int) -> Rope:
    """The rotation of a model whose heads turn whole.

    Version 5 has everything in `rope_parameters`; version 4 has `rope_theta` and `rope_scaling`. A
    file may hold both, if they say the same.

    Raises: ConfigError for a kind of scaling we do not have, or two forms that disagree.
    """
    theta = hf.number("rope_theta", 10_000.0)
    original = hf.take("original_max_position_embeddings", None)
    hf.require("partial_rotary_factor", 1.0, "the heads of this family turn whole")
    ropes = []
    for key in ("rope_scaling", "rope_parameters"):
        if (section := hf.section(key)) is not None:
            if original is not None:
                section.raw["original_max_position_embeddings"] = original
            ropes.append(_read(section, theta, head_width, max_positions))
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise ConfigError(
            f"{hf.path}: rope_scaling gives {ropes[0]}, but rope_parameters gives {ropes[1]}; "
            "remove the one that is wrong"
        )
    return ropes[0] if ropes else Rope(theta=theta, rotated=head_width)


def _read(hf: HFConfig, theta: float, head_width: int, max_positions: int) -> Rope:
    kind = hf.take("rope_type", None) or hf.take("type", "default")
    hf.require("partial_rotary_factor", 1.0, "the heads of this family turn whole")
    theta = hf.number("rope_theta", theta)
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=hf.number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=hf.number("factor"),
            low_freq_factor=hf.number("low_freq_factor"),
            high_freq_factor=hf.number("high_freq_factor"),
            original_positions=hf.count("original_max_position_embeddings", max_positions),
        )
    elif kind == "yarn":
        scaling = _yarn(hf, max_positions)
    elif kind != "default":
        raise ConfigError(
            f"{hf.path}: rope_type={kind!r} is not implemented; "
            "expected default | linear | llama3 | yarn"
        )
    hf.finish(_HARMLESS)
    return Rope(theta=theta, rotated=head_width, scaling=scaling)


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

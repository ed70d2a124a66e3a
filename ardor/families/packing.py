"""What `quantization_config` says of weights that are published in eight bits.

Source: transformers 5.23, utils/quantization_config.py (FineGrainedFP8Config).
"""

from typing import NamedTuple

from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig


class FP8(NamedTuple):
    """Linear maps may be E4M3 numbers beside scales; the names of the tensors tell which are."""

    block: tuple[int, int] | None  # rows and columns that share a scale; None: the whole matrix


def read_fp8(hf: HFConfig) -> FP8 | None:
    """None if the weights are not FP8.

    Raises: ConfigError for another kind of FP8, or a key that nothing reads.
    """
    section = hf.section("quantization_config")
    if section is None or section.take("quant_method", None) != "fp8":
        return None
    section.require("fmt", "e4m3", "that is the format which is read")
    section.require("expert_dtype", "fp8", "experts are as other maps are")
    section.require("modules_to_convert", None, "only linear maps are read in FP8")
    section.choice("scale_fmt", {"float": None, "ue8m0": None}, "float")  # the files tell
    for key in (
        "modules_to_not_convert",  # the names of the tensors tell
        "ignored_layers",
        "activation_scheme",  # how a GPU may round what a map reads; here nothing is rounded
        "dequantize",  # how transformers holds them
    ):
        section.take(key, None)
    block = section.raw.get("weight_block_size", [128, 128])
    section.take("weight_block_size", None)
    section.finish({})
    if block is None:
        return FP8(None)
    if (
        not isinstance(block, list | tuple)
        or [type(n) is int and n > 0 for n in block] != [True] * 2
    ):
        raise ConfigError(f"{section.path}: weight_block_size={block!r} are not two whole numbers")
    return FP8((block[0], block[1]))

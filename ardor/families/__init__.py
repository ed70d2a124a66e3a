"""What other people's checkpoints mean: config.json <-> spec, tensor names <-> tensor names."""

import difflib
from collections.abc import Mapping
from typing import Any

from ardor.errors import ConfigError
from ardor.families.family import Family
from ardor.families.gemma2 import GEMMA2
from ardor.families.gpt2 import GPT2
from ardor.families.granite_moe import GRANITE_MOE
from ardor.families.llama import LLAMA
from ardor.families.mixtral import MIXTRAL
from ardor.families.olmoe import OLMOE
from ardor.families.phimoe import PHIMOE
from ardor.families.qwen_moe import QWEN2_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "granitemoe": GRANITE_MOE,
    "phimoe": PHIMOE,
}


def family_of(config: Mapping[str, Any], path: str = "config.json") -> Family:
    """The family of a parsed config.json.

    Raises: ConfigError if its model_type is missing or unknown (with the list of what is known).
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.8)
    raise ConfigError(
        f"{path}: model_type={model_type!r} is not implemented"
        + (f" (like {near[0]!r})" if near else "")
        + f"; expected {' | '.join(FAMILIES)}"
    )

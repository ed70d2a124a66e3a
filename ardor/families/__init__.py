"""What other people's checkpoints mean: config.json <-> spec, tensor names <-> tensor names."""

import difflib
from collections.abc import Mapping
from typing import Any

from ardor.errors import ConfigError
from ardor.families.deepseek_v2 import DEEPSEEK_V2
from ardor.families.deepseek_v3 import DEEPSEEK_V3
from ardor.families.family import Family
from ardor.families.gemma2 import GEMMA2
from ardor.families.gpt2 import GPT2
from ardor.families.gpt_oss import GPT_OSS
from ardor.families.llama import LLAMA
from ardor.families.llama4 import LLAMA4_TEXT

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2": DEEPSEEK_V2,
    "gpt_oss": GPT_OSS,
    "llama4_text": LLAMA4_TEXT,
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

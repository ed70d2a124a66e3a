"""What other people's checkpoints mean: config.json <-> spec, tensor names <-> tensor names."""

import difflib
from collections.abc import Mapping
from typing import Any

from ardor.errors import ConfigError
from ardor.families.arcee import ARCEE
from ardor.families.family import Family
from ardor.families.gemma2 import GEMMA2
from ardor.families.gpt2 import GPT2
from ardor.families.granite import GRANITE
from ardor.families.llama import LLAMA
from ardor.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from ardor.families.phi3 import PHI3
from ardor.families.qwen import QWEN2, QWEN3
from ardor.families.seed_oss import SEED_OSS
from ardor.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "seed_oss": SEED_OSS,
    "arcee": ARCEE,
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

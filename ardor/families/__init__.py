"""What other people's checkpoints mean: config.json <-> spec, tensor names <-> tensor names."""

import difflib
from collections.abc import Mapping
from typing import Any

from ardor.arch.spec import Decoder
from ardor.errors import ConfigError
from ardor.families.arcee import ARCEE
from ardor.families.bloom import BLOOM
from ardor.families.cohere import COHERE, COHERE2
from ardor.families.deepseek_v2 import DEEPSEEK_V2
from ardor.families.deepseek_v3 import DEEPSEEK_V3
from ardor.families.exaone4 import EXAONE4
from ardor.families.falcon import FALCON
from ardor.families.family import BRIDGE, Family
from ardor.families.gemma import GEMMA
from ardor.families.gemma2 import GEMMA2
from ardor.families.gemma3 import GEMMA3, GEMMA3_TEXT
from ardor.families.gemma4 import GEMMA4, GEMMA4_TEXT
from ardor.families.glm import GLM, GLM4
from ardor.families.gpt2 import GPT2
from ardor.families.gpt_bigcode import GPT_BIGCODE
from ardor.families.gpt_neox import GPT_NEOX
from ardor.families.gpt_oss import GPT_OSS
from ardor.families.gptj import GPTJ
from ardor.families.granite import GRANITE
from ardor.families.granite_moe import GRANITE_MOE
from ardor.families.llama import LLAMA
from ardor.families.llama4 import LLAMA4_TEXT
from ardor.families.llama4_images import LLAMA4
from ardor.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL, MISTRAL3
from ardor.families.mixtral import MIXTRAL
from ardor.families.mpt import MPT
from ardor.families.native import NATIVE
from ardor.families.nemotron import NEMOTRON
from ardor.families.olmo import OLMO, OLMO2, OLMO3
from ardor.families.olmoe import OLMOE
from ardor.families.opt import OPT
from ardor.families.phi import PHI
from ardor.families.phi3 import PHI3
from ardor.families.phimoe import PHIMOE
from ardor.families.qwen import QWEN2, QWEN3
from ardor.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from ardor.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from ardor.families.seed_oss import SEED_OSS
from ardor.families.smollm3 import SMOLLM3
from ardor.families.stablelm import STABLELM
from ardor.families.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gpt_neox": GPT_NEOX,
    "starcoder2": STARCODER2,
    "phi": PHI,
    "gptj": GPTJ,
    "stablelm": STABLELM,
    "opt": OPT,
    "gpt_bigcode": GPT_BIGCODE,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mistral3": MISTRAL3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "seed_oss": SEED_OSS,
    "bloom": BLOOM,
    "falcon": FALCON,
    "RefinedWeb": FALCON,
    "RefinedWebModel": FALCON,
    "mpt": MPT,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "nemotron": NEMOTRON,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4_TEXT,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "glm": GLM,
    "glm4": GLM4,
    "exaone4": EXAONE4,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2": DEEPSEEK_V2,
    "gpt_oss": GPT_OSS,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4_TEXT,
    "arcee": ARCEE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "granitemoe": GRANITE_MOE,
    "phimoe": PHIMOE,
    "ardor": NATIVE,
}


def implemented(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is for one of our families, and needs no code of its own."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.computes(config)


def family_of(config: Mapping[str, Any], path: str = "config.json") -> Family:
    """The family of a parsed config.json.

    Raises: ConfigError if its model_type is missing or unknown (with the list of what is known).
    """
    model_type = config.get("model_type")
    if (family := FAMILIES.get(str(model_type))) is not None:
        return family
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.8)
    raise ConfigError(
        f"{path}: model_type={model_type!r} is not implemented"
        + (f" (like {near[0]!r})" if near else "")
        + f"; expected {' | '.join(FAMILIES)}; or {BRIDGE}"
    )


def family_for(spec: Decoder) -> Family:
    """The first family that can write `spec` so that others read it; else our own form of it."""
    for family in FAMILIES.values():
        if family.write is None or family is NATIVE:
            continue
        try:
            family.config(spec)
        except ConfigError:
            continue
        return family
    return NATIVE

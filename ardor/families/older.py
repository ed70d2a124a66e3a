"""The keys that a config.json of transformers 5 lacks for older readers: they would take defaults.

transformers 4, and whatever reads config.json itself (vLLM, llama.cpp's converter), look for
`torch_dtype`, `rope_theta` and `rope_scaling`; transformers 5 writes `dtype` and `rope_parameters`
alone, and reads both.
"""

from collections.abc import Mapping
from typing import Any

# Families whose version 4 has other names for them.
_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
_LOCAL_THETA = {"gemma3": "rope_local_base_freq", "gemma3_text": "rope_local_base_freq"}
_SAME_THETA = ("olmo3",)  # there the windowed layers turn by the same theta, unscaled
_OTHER_KEYS = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Families whose version 4 takes a scaling of exactly these keys, of which `type` is one.
_SCALING = {
    "olmo": {"type", "factor"},
    "phi3": {"type", "short_factor", "long_factor"},
}


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` and, where it has only the newer key, the older one that says the same."""
    found = dict(config)
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = with_older_keys(text)
    added: dict[str, Any] = {}
    if found.get("dtype") is not None:
        added["torch_dtype"] = found["dtype"]
    rope, kind = found.get("rope_parameters"), str(found.get("model_type"))
    for newer, older in _OTHER_KEYS.get(kind, {}).items():
        if found.get(newer) is not None:
            added[older] = found[newer]
    if isinstance(rope, Mapping):
        added |= _rope_keys(rope, kind, found)
    return found | {key: value for key, value in added.items() if found.get(key) is None}


def _rope_keys(rope: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    if isinstance(full := rope.get("full_attention"), Mapping):
        local = rope.get("sliding_attention")
        theta = local.get("rope_theta") if isinstance(local, Mapping) else None
        same = theta in (None, full.get("rope_theta"))
        if kind not in _LOCAL_THETA and not (kind in _SAME_THETA and same):
            return {}  # version 4 has no way to say it
        if kind in _LOCAL_THETA and theta is not None:
            added[_LOCAL_THETA[kind]] = theta
        rope = full
    names = _NAMES.get(kind, {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            added[names.get(key, key)] = rope[key]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        added["rope_scaling"] = _scaling(scaling, kind, config)
    return added


def _scaling(scaling: dict[str, Any], kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling in the keys that the family's version 4 allows, where these say all of it."""
    allowed = _SCALING.get(kind, set())
    short = {**scaling, "type": scaling["rope_type"]}  # whatever name it had before, as "su"
    del short["rope_type"]
    extra = {key: value for key, value in short.items() if key not in allowed}
    if allowed and all(config.get(key) == value for key, value in extra.items()):
        return {key: short[key] for key in short if key in allowed}
    return scaling

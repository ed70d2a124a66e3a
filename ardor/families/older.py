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


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` and, where it has only the newer key, the older one that says the same."""
    found = dict(config)
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = with_older_keys(text)
    added: dict[str, Any] = {}
    if found.get("dtype") is not None:
        added["torch_dtype"] = found["dtype"]
    rope, kind = found.get("rope_parameters"), str(found.get("model_type"))
    if isinstance(rope, Mapping):
        added |= _rope_keys(rope, kind)
    return found | {key: value for key, value in added.items() if found.get(key) is None}


def _rope_keys(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    added: dict[str, Any] = {}
    if isinstance(full := rope.get("full_attention"), Mapping):
        if kind not in _LOCAL_THETA:
            return {}  # version 4 has no way to say it
        if isinstance(local := rope.get("sliding_attention"), Mapping):
            added[_LOCAL_THETA[kind]] = local.get("rope_theta")
        rope = full
    names = _NAMES.get(kind, {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            added[names.get(key, key)] = rope[key]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        added["rope_scaling"] = scaling
    return {key: value for key, value in added.items() if value is not None}

"""A config.json that knows which of its keys were read, so that none is ignored by accident."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ardor.errors import ConfigError
from ardor.precision import dtype_of

# A layer takes memory before any weight is read: a wrong digit must not take all of it.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# By which something is divided, or which would make all scores alike. No number is below 0.
POSITIVE = (
    *("rope_theta", "rotary_emb_base", "rope_local_base_freq", "factor", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("partial_rotary_factor", "rotary_pct"),
    *("query_pre_attn_scalar", "attention_multiplier", "softmax_scale", "alibi_bias_max"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling"),
    *("clip_qkv", "swiglu_limit"),
)
MOST_LAYERS, MOST = 10_000, 2**31 - 1


class HFConfig:
    """The keys of a config.json, or of an object inside one. A null is the same as absence.

    Every getter marks its key as read and checks the type; one without a default is required.
    `finish` refuses what nothing read. `raw` and `text` are the file as it was, for saving.
    """

    def __init__(self, raw: Mapping[str, Any], *, path: str, text: str | None = None):
        self.raw, self.path, self.text = dict(raw), path, text
        self._unread = {key for key, value in raw.items() if value is not None}
        self._names: dict[str, str] = {}  # of what is asked for -> in the file

    def alias(self, **names: str) -> None:
        """Let the file hold a key under another name: `hidden_size="n_embd"`.

        Raises: ConfigError if it holds both, and they differ.
        """
        for key, other in names.items():
            if (value := self.take(other, None)) is None:
                continue
            if (own := self.take(key, value)) != value:
                raise ConfigError(
                    f"{self.path}: {key}={own!r} and {other}={value!r} mean the same; "
                    "remove the one that is wrong"
                )
            self._names[key] = other

    def _at(self, key: str) -> str:
        """The place of `key`, by the name that the file has for it."""
        return f"{self.path}: {self._names.get(key, key)}"

    def take(self, key: str, default: Any = ...) -> Any:
        """The value of `key`, whatever its type.

        Raises: ConfigError if there is neither the key nor a default.
        """
        key = self._names.get(key, key)
        self._unread.discard(key)
        if (value := self.raw.get(key)) is not None:
            return value
        if default is not ...:
            return default
        near = difflib.get_close_matches(key, self.raw, n=1)
        raise ConfigError(f"{self.path}: no {key!r}" + (f" (found {near[0]!r})" if near else ""))

    def count(self, key: str, default: Any = ...) -> int:
        value = self.take(key, default)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self._at(key)}={value!r} is not a whole number above 0")
        if value > (most := MOST_LAYERS if key in LAYERS else MOST):
            raise ConfigError(f"{self._at(key)}={value} is more than any model has ({most})")
        return value

    def number(self, key: str, default: Any = ...) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{self._at(key)}={value!r} is not a number")
        if value < 0 or (value == 0 and key in POSITIVE):
            least = "above 0" if key in POSITIVE else "at least 0"
            raise ConfigError(f"{self._at(key)}={value!r} is not {least}")
        return float(value)

    def natural(self, key: str, default: Any = ...) -> int:
        """A count that may be 0."""
        value = self.take(key, default)
        return 0 if type(value) is int and value == 0 else self.count(key, default)

    def layer_set(self, key: str, count: int, default: Any = ...) -> frozenset[int]:
        """A list of some of `count` layers, by index."""
        value = self.take(key, default)
        known = range(count)
        if not isinstance(value, list) or not all(type(i) is int and i in known for i in value):
            raise ConfigError(
                f"{self._at(key)}={value!r} is not a list of layers, which are 0 to {count - 1}"
            )
        return frozenset(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A number, or None where the file says null: unlike elsewhere, that is not its absence."""
        if key in self.raw and self.raw[key] is None:
            return None
        return None if self.take(key, default) is None else self.number(key, default)

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        """As `optional_number`, of a count."""
        if key in self.raw and self.raw[key] is None:
            return None
        return None if self.take(key, default) is None else self.count(key, default)

    def flag(self, key: str, default: Any = ...) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise ConfigError(f"{self._at(key)}={value!r} is neither true nor false")
        return value

    def choice(self, key: str, known: Mapping[str, Any], default: Any = ...) -> Any:
        """What the value of `key` stands for in `known`."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in known:
            raise ConfigError(
                f"{self._at(key)}={value!r} is not implemented; expected {' | '.join(known)}"
            )
        return known[value]

    def section(self, key: str) -> "HFConfig | None":
        """The object under `key`, which keeps its own account; None if absent or empty."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path}: {key}={value!r} is not an object")
        return HFConfig(value, path=f"{self.path}, {key}") if value else None

    def require(self, key: str, only: Any, why: str) -> None:
        """Accept one value of `key`, or its absence."""
        if (value := self.take(key, only)) != only:
            raise ConfigError(
                f"{self.path}: {key}={value!r} is not implemented, only {only!r}: {why}"
            )

    def dtype(self) -> str | None:
        """The dtype the weights are said to have, such as "bfloat16"; v5's key wins over v4's."""
        value = self.take("dtype", None) or self.take("torch_dtype", None)
        if value is None:
            return None
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: dtype={value!r} is not the name of a dtype")
        return value.removeprefix("torch.")

    def weights_dtype(self) -> torch.dtype | None:
        """The dtype that the file gives the weights, or its part about text does.

        Raises: ConfigError if it is none that weights are held in.
        """
        text = self.section("text_config")
        name = self.dtype() or (None if text is None else text.dtype())
        if name is None or name == "float64":  # which files may have, but no flag asks for
            return None if name is None else torch.float64
        try:
            return dtype_of(name)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}; correct it, or remove the key") from error

    def unread(self, harmless: Mapping[str, str]) -> list[str]:
        """The keys that nothing read, and that are not `harmless`."""
        return sorted(self._unread - set(harmless))

    def finish(self, harmless: Mapping[str, str]) -> None:
        """Check that every key was read, or is in `harmless` (key -> why it changes no result)."""
        if not (unread := self.unread(harmless)):
            return
        known = {*self.raw, *harmless} - {*unread}
        names = []
        for key in unread:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            names.append(f"{key}={self.raw[key]!r}" + (f" (like {near[0]})" if near else ""))
        raise ConfigError(
            f"{self.path}: nothing reads {', '.join(names)}; skipping it may change results, so "
            "correct or remove the key if it means nothing"
        )

    def written(self, changes: Mapping[str, Any]) -> str:
        """The file as it was, byte for byte, but for the keys in `changes` (None removes one)."""
        kept = {k: v for k, v in {**self.raw, **changes}.items() if changes.get(k, ...) is not None}
        if self.text is not None and kept == self.raw:
            return self.text
        return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"

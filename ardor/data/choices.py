"""What people choose about their data, without what it takes to read any."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from ardor.errors import ConfigError

OverLength = Literal["drop", "truncate_left", "truncate_right", "error", "truncate"]
"""What becomes of examples above the limit. `truncate` is the older name of `truncate_left`."""

Preferences = Literal["refuse", "chosen"]
"""What training on text makes of rows that compare two answers."""

Datasets = str | tuple[str, ...]
"""One dataset or several, each written as `Part` says."""

KEYS = ("path", "weight", "split")
_OPTION = re.compile(r",(\w+)=([^,]*)$")


@dataclass(frozen=True, slots=True)
class Part:
    """A dataset of a mixture, written `PATH`, `PATH,weight=2` or `PATH,split=train,weight=2`.

    Weights are relative: 3 beside 1 is three quarters.

    Raises: ConfigError for a weight that is not a number above 0.
    """

    path: str
    weight: str | None = None  # as it was written, so that 0.1 is a tenth
    split: str | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            return
        try:
            fits = Fraction(self.weight) > 0
        except (ValueError, ZeroDivisionError):
            fits = False
        if not fits:
            raise ConfigError(
                f"the weight of {self.path} is {self.weight!r}; expected a number above 0, as in "
                f"{self.path},weight=2"
            )

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that `PATH,weight=W,split=S` means.

        Raises: ConfigError for another key, or one given twice.
        """
        path, options = text, {}
        while (match := _OPTION.search(path)) and not Path(path).exists():
            key, value = match.groups()
            if key in options or key not in KEYS[1:]:
                near = difflib.get_close_matches(key, KEYS[1:], n=1)
                what = "given twice" if key in options else "unknown"
                hint = f"did you mean {near[0]}?" if near else "known are weight and split"
                raise ConfigError(f"data {text!r}: {key!r} is {what}; {hint}")
            options[key] = value
            path = path[: match.start()]
        return cls(path, options.get("weight"), options.get("split"))

    @classmethod
    def of(cls, value: Any) -> "Part":
        """The part that a mapping of YAML, or a string, means.

        Raises: ConfigError if it is neither, or has other keys than path, weight and split.
        """
        if isinstance(value, str | Path):
            return cls.parse(str(value))
        if not isinstance(value, Mapping) or "path" not in value or set(value) - set(KEYS):
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise ConfigError(
                f"data: found {found}; expected a path, or path with weight and split, as in "
                "{path: a.jsonl, weight: 2}"
            )
        given = {key: None if value.get(key) is None else str(value[key]) for key in KEYS[1:]}
        return cls(str(value["path"]), given["weight"], given["split"])

    def __str__(self) -> str:
        options = [f",{k}={v}" for k in KEYS[1:] if (v := getattr(self, k)) is not None]
        return self.path + "".join(options)

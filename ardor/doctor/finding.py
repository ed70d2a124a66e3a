"""What a rule has found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# E: it will not load, or computes something else. W: probably not what was meant. I: worth knowing.
Level = Literal["E", "W", "I"]
WORDS: dict[Level, str] = {"E": "error", "W": "warning", "I": "info"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, how it shows, and what to do about it."""

    level: Level
    what: str
    evidence: str
    fix: str
    rule: str = ""  # set by whoever ran it


def listed(names: Sequence[object], most: int = 5) -> str:
    """Some of many, with how many there are beside."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def many(count: int, one: str, more: str | None = None) -> str:
    """A count with its noun: "1 tensor", "2 tensors"."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"

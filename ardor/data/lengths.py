"""What becomes of an example that is longer than the limit.

Axes: N tokens of one example.
"""

from collections.abc import Iterator
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32

from ardor.data.choices import OverLength
from ardor.errors import ConfigError


class Marked(NamedTuple):
    """Tokens in order, and which of them are trained on; `text.example.Example` as arrays."""

    tokens: Int32[np.ndarray, "N"]
    supervised: Bool[np.ndarray, "N"]

    @property
    def targets(self) -> int:
        """How many tokens count in the loss: the first of a document never does."""
        return int(np.count_nonzero(self.supervised[1:]))

    def part(self, start: int, stop: int) -> "Marked":
        """Tokens `start` up to `stop`, or to the end."""
        return Marked(self.tokens[start:stop], self.supervised[start:stop])


def policy_of(name: str) -> OverLength:
    """The policy of that name.

    Raises: ConfigError if there is none.
    """
    if name not in get_args(OverLength):
        known = ", ".join(get_args(OverLength)[:-1])
        raise ConfigError(f"over_length is {name!r}; choose from {known}")
    return "truncate_left" if name == "truncate" else name  # type: ignore[return-value]


def pieces(document: Marked, limit: int) -> Iterator[Marked]:
    """Runs of at most `limit` tokens, each starting on the last token of the one before.

    So every token but the first is predicted exactly once, the stop token too.
    """
    for start in range(0, len(document.tokens) - 1, limit - 1):
        yield document.part(start, start + limit)


def keep_end(example: Marked, limit: int, bos: int | None) -> Marked | None:
    """The end of the example that fits, with its last answer whole; None if there is no such.

    What follows the last answer teaches nothing and goes first. A BOS token stays in front: models
    put attention there that has nowhere else to go. An earlier answer that the cut goes through,
    or that is left without a prompt, is no longer trained on.
    """
    marks = example.supervised
    stop = int(np.flatnonzero(marks)[-1]) + 1
    before = np.flatnonzero(~marks[: stop - 1])
    answer = int(before[-1]) + 1 if len(before) else 0
    if stop <= limit:
        return example.part(0, stop)
    head = 1 if bos is not None and example.tokens[0] == bos else 0
    start = stop - (limit - head)
    if start >= answer:
        return None
    cut = start + int(np.argmin(marks[start:stop]))  # the first token that is not trained on
    tokens = np.concatenate([example.tokens[:head], example.tokens[start:stop]])
    supervised = np.concatenate([np.zeros(head + cut - start, dtype=np.bool_), marks[cut:stop]])
    return Marked(tokens, supervised)


def keep_start(example: Marked, limit: int) -> tuple[Marked, bool] | None:
    """The start of the example that fits, and whether it has lost the end of an answer.

    None if nothing is left to predict. No stop token is put in place of a lost one.
    """
    kept = example.part(0, limit)
    if not kept.targets:
        return None
    # Whole turns may be all that went: then the last answer that is kept still has its end.
    return kept, bool(kept.supervised[-1] and example.supervised[limit])

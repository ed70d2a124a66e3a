"""Padded rectangles, for the edges where other tools want one. Inside there are only lengths.

The masks and positions are made from the lengths of the rows, so whatever id fills them up, EOS or
a token that the rows hold too, changes no result.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ardor.errors import TextError

Side = Literal["left", "right"]
IGNORED = -100  # a label that is no target, as torch's and transformers' losses have it


class Padded(NamedTuple):
    """Rows of equal length, in transformers' names: `model(**{k: torch.tensor(v) ...})`.

    `labels` are the ids of trained tokens, unshifted, and -100 elsewhere; None without examples.
    """

    input_ids: list[list[int]]
    attention_mask: list[list[int]]  # 1 where a row has a token of its own
    position_ids: list[list[int]]  # counted from the first of those; 0 at the padding
    labels: list[list[int]] | None = None


def pad(
    rows: Sequence[Sequence[int]], fill: int, side: Side = "left", multiple_of: int = 1
) -> Padded:
    """`rows` filled up with `fill` to the longest, or further to a multiple of `multiple_of`.

    "left" is for generation: every row then ends where it goes on. "right" is for training.

    Raises: TextError if there are no rows, or for a side or multiple that is none.
    """
    if side not in ("left", "right"):
        raise TextError(f"side={side!r} is neither 'left' (to generate) nor 'right' (to train)")
    if multiple_of < 1:
        raise TextError(f"multiple_of={multiple_of} must be at least 1")
    if not rows:
        raise TextError("there are no rows to pad; give at least one")
    longest = -(-max(map(len, rows)) // multiple_of) * multiple_of
    filler = (fill, 0, 0)
    columns: tuple[list[list[int]], ...] = ([], [], [])
    for row in rows:
        values = ([*row], [1] * len(row), [*range(len(row))])
        for column, value, by in zip(columns, values, filler, strict=True):
            column.append(filled(value, by, longest, side))
    return Padded(*columns)


def filled(row: list[int], by: int, length: int, side: Side) -> list[int]:
    """The row with `by` on that side, up to a length."""
    missing = [by] * (length - len(row))
    return missing + row if side == "left" else row + missing

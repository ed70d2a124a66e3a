"""Who may read whom in a batch, as data: lengths, never a padding id.

Axes: B batch rows, T new positions, S cached + new positions.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ardor.errors import ShapeError


@dataclass(frozen=True)
class Packed:
    """Rows of whole documents: row b holds documents of `lengths[b]`, in order, without gaps.

    A position reads itself and the earlier positions of its own document; positions restart at 0
    in each. A row of one document is the plain causal case.

    Raises: ShapeError if rows differ in length or a document is empty.
    """

    lengths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len({sum(row) for row in self.lengths}) != 1 or min(map(min, self.lengths)) < 1:
            raise ShapeError(
                f"document lengths {self.lengths} do not make rows of one length; "
                "every row must hold as many positions as the others, in documents of at least 1"
            )

    @classmethod
    def whole(cls, rows: int, positions: int) -> "Packed":
        """`rows` rows, each one document of `positions` tokens."""
        return cls(((positions,),) * rows)

    @property
    def longest(self) -> int:
        return max(max(row) for row in self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(start, count, length): neighbouring documents of equal length, over the flattened rows.

        Together they tile the flattened [B*T] positions; each run is one dense batch [count,
        length], which is how a backend attends within documents without visiting masked blocks.
        """
        runs, start = [], 0
        for length, same in groupby(n for row in self.lengths for n in row):
            count = len(list(same))
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    def positions(self, device: torch.device) -> Int[Tensor, "B T"]:
        rows = [torch.cat([torch.arange(n, device=device) for n in row]) for row in self.lengths]
        return torch.stack(rows)

    def allowed(self, device: torch.device) -> Bool[Tensor, "B 1 T T"]:
        """The dense mask of the reference: causal, and within one document."""
        document = torch.stack(
            [
                torch.repeat_interleave(
                    torch.arange(len(row), device=device), torch.tensor(row, device=device)
                )
                for row in self.lengths
            ]
        )
        same = document[:, :, None] == document[:, None, :]  # (B, T, T)
        return (same & torch.ones_like(same).tril())[:, None]


@dataclass(frozen=True)
class Cached:
    """`new` positions per row after `past[b]` cached ones; row b reads slots 0 .. past[b] + t."""

    past: tuple[int, ...]
    new: int

    @property
    def longest(self) -> int:
        return max(self.past) + self.new

    @property
    def even(self) -> bool:
        """Whether every row has as much past as the others."""
        return min(self.past) == max(self.past)

    def positions(self, device: torch.device) -> Int[Tensor, "B T"]:
        starts = torch.tensor(self.past, device=device)
        return starts[:, None] + torch.arange(self.new, device=device)

    def allowed(self, device: torch.device) -> Bool[Tensor, "B 1 T S"]:
        slots = torch.arange(self.longest, device=device)
        return (slots <= self.positions(device)[..., None])[:, None]


Layout = Packed | Cached

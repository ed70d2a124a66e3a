"""Who may read whom in a batch, as data: lengths, never a padding id.

Axes: B batch rows, T new positions, S cached + new positions.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ardor.errors import ShapeError


class Reach(NamedTuple):
    """How far back a position reads within its own text: everywhere, unless said otherwise."""

    window: int | None = None  # so many positions, itself included
    chunk: int | None = None  # only its own chunk of so many positions

    def covers(self, longest: int) -> bool:
        """Whether it cuts nothing off in a text of `longest` positions."""
        return all(limit is None or limit >= longest for limit in self)

    def first(self, position: int) -> int:
        """The first position that `position` reads."""
        starts = [0]
        if self.window is not None:
            starts.append(position - self.window + 1)
        if self.chunk is not None:
            starts.append(position - position % self.chunk)
        return max(starts)

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether each query position may read each key position; the two broadcast."""
        allowed = key <= query
        if self.window is not None:
            allowed &= query - key < self.window
        if self.chunk is not None:
            allowed &= query // self.chunk == key // self.chunk
        return allowed


ALL = Reach()


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

    def text_lengths(self, device: torch.device) -> Int[Tensor, "B T"]:
        """How long the document of each position is."""
        rows = [torch.tensor(row, device=device) for row in self.lengths]
        return torch.stack([row.repeat_interleave(row) for row in rows])

    def documents(self, device: torch.device) -> Int[Tensor, "B T"]:
        """Which document of its row each position is in."""
        rows = [torch.tensor(row, device=device) for row in self.lengths]
        return torch.stack([torch.arange(len(r), device=device).repeat_interleave(r) for r in rows])

    def allowed(self, device: torch.device, reach: Reach = ALL) -> Bool[Tensor, "B 1 T T"]:
        """The dense mask of the reference: causal, within reach, and within one document."""
        document = self.documents(device)
        same = document[:, :, None] == document[:, None, :]  # (B, T, T)
        positions = self.positions(device)
        return (same & reach.mask(positions[:, :, None], positions[:, None, :]))[:, None]

    def distances(self, device: torch.device) -> Int[Tensor, "B 1 T T"]:
        """Key position minus query position, meaningful where `allowed`."""
        positions = self.positions(device)
        return (positions[:, None, :] - positions[:, :, None])[:, None]


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

    def text_lengths(self, device: torch.device) -> Int[Tensor, "B T"]:
        """How long the row of each new position is by now."""
        totals = torch.tensor(self.past, device=device) + self.new
        return totals[:, None].expand(-1, self.new)

    def allowed(self, device: torch.device, reach: Reach = ALL) -> Bool[Tensor, "B 1 T S"]:
        slots = torch.arange(self.longest, device=device)
        return reach.mask(self.positions(device)[..., None], slots)[:, None]

    def distances(self, device: torch.device) -> Int[Tensor, "B 1 T S"]:
        """Key position minus query position, meaningful where `allowed`."""
        slots = torch.arange(self.longest, device=device)
        return (slots - self.positions(device)[..., None])[:, None]


Layout = Packed | Cached

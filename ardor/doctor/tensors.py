"""What one pass over a tensor tells: no more of it than a piece is in memory as float32."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ardor.files.weights import WeightFiles

PIECE = 1 << 20  # values held at a time, as float32
ROWS = 8  # constant ones that are named


@dataclass(frozen=True)
class Statistics:
    """Of a floating-point tensor; a row is all that its last axis spans."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nan: int
    infinite: int
    largest: float  # magnitude, of the finite values
    rms: float  # of the finite values, but for one of the largest
    constant: tuple[int, ...]  # the first rows that hold one value throughout
    constant_rows: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def zero(self) -> bool:
        return self.largest == 0 and not self.nan and not self.infinite


def measure(files: WeightFiles, name: str) -> Statistics | None:
    """None for codes and other tensors that hold no floating-point numbers, or nothing.

    Raises: CheckpointError if it cannot be read.
    """
    tensor = files.read(name)
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    nan = infinite = count = start = 0
    total = largest = 0.0
    constant: list[int] = []
    for piece in rows.split(max(1, PIECE // rows.shape[1])):
        values = _wide(piece)
        low, high = values.amin(1), values.amax(1)
        same = (low == high).nonzero()[:, 0] if rows.shape[1] > 1 else low.new_empty(0)
        count += len(same)
        constant += [start + int(row) for row in same[: ROWS - len(constant)]]
        peaks = torch.maximum(high, -low)
        if not bool(torch.isfinite(peaks).all()):
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
            values = values.where(values.isfinite(), 0.0)
            peaks = values.abs().amax(1)
        squares = torch.linalg.vector_norm(values, dim=1).double().square()
        # One value may be far larger than the rest, whose rms a float32 sum would then lose.
        at = int(peaks.argmax())
        squares[at] = values[at].double().square().sum()
        total += float(squares.sum())
        largest = max(largest, float(peaks[at]))
        start += len(piece)
    counted = tensor.numel() - nan - infinite
    others = max(0.0, total - largest**2) / max(1, counted - 1)
    return Statistics(
        name=name,
        file=str(files.file(name)),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        nan=nan,
        infinite=infinite,
        largest=largest,
        rms=math.sqrt(others),
        constant=tuple(constant),
        constant_rows=count,
    )


def _wide(piece: Tensor) -> Tensor:
    return piece if piece.dtype == torch.float64 else piece.float()

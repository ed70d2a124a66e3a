"""Products of many rows with a thin matrix, compiled; for processors that multiply bfloat16.

An adapter's, forward and backward. Call them where `takes(x, r)`. Axes: N rows, W width, R rank.
"""

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from ardor.kernels.native import available, library

FEWEST = 8  # rows: for fewer, packing costs as much as the product
WIDTHS, RANKS = 32, 8  # what widths and ranks are multiples of


def takes(x: Tensor, r: int) -> bool:
    rows, width = x.shape
    return (
        rows >= FEWEST
        and fits(width)
        and r % RANKS == 0
        and x.dtype == torch.bfloat16
        and available(x)
        and hasattr(library(), "thin_dots")
    )


def fits(width: int) -> bool:
    return width % WIDTHS == 0


def dots(
    x: BFloat16[Tensor, "N W"], a: BFloat16[Tensor, "R W"], scale: float = 1.0
) -> BFloat16[Tensor, "N R"]:
    """scale * x a^T"""
    (rows, width), r = x.shape, len(a)
    low = torch.empty(rows, r, dtype=x.dtype)
    _call("thin_dots", (x.contiguous(), a.contiguous(), low), rows, width, r, scale)
    return low


def add(
    y: BFloat16[Tensor, "N W"] | None,
    low: BFloat16[Tensor, "N R"],
    a: BFloat16[Tensor, "R W"],
    scale: float = 1.0,
    *,
    out: BFloat16[Tensor, "N W"] | None = None,
) -> BFloat16[Tensor, "N W"]:
    """y + scale * low a, rounded once; y is zero without it, and may itself be `out`."""
    (rows, r), width = low.shape, a.shape[1]
    if out is None:
        out = torch.empty(rows, width, dtype=low.dtype)
    assert out.is_contiguous() and (y is None or y.is_contiguous())
    packed = torch.empty(r * width // 2, dtype=torch.int32)
    tensors = (y, low.contiguous(), a.contiguous(), out, packed)
    _call("thin_add", tensors, rows, width, r, scale)
    return out


def outer(
    x: BFloat16[Tensor, "N W"], low: BFloat16[Tensor, "N R"], scale: float = 1.0
) -> Float32[Tensor, "R W"]:
    """scale * low^T x, not rounded"""
    (rows, width), r = x.shape, low.shape[1]
    out = torch.empty(r, width, dtype=torch.float32)
    packed = torch.empty((rows + 1) // 2 * r, dtype=torch.int32)
    _call("thin_outer", (x.contiguous(), low.contiguous(), out, packed), rows, width, r, scale)
    return out


def _call(name: str, tensors: tuple[Tensor | None, ...], *numbers: int | float) -> None:
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    getattr(library(), name)(*pointers, *numbers, torch.get_num_threads())

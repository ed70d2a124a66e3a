"""Rotary positions, compiled. Call it where `takes(x, cos)`.

Axes: B batch, T positions, H heads, d head width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import NAMES, available, library, threads


def takes(x: Tensor, cos: Tensor) -> bool:
    """Whether `rotate` can stand in for the reference."""
    return available(x) and cos.dtype == x.dtype and cos.shape[0] == x.shape[0]


def rotate(
    x: Float[Tensor, "B H T d"],
    cos: Float[Tensor, "B 1 T half"],
    sin: Float[Tensor, "B 1 T half"],
    *,
    back: bool = False,
) -> Float[Tensor, "B H T d"]:
    """Every pair (i, i + half) turned by its angle, or back by it."""
    if not x.transpose(1, 2).is_contiguous():  # as attention makes it; else y is laid out anew
        x = x.contiguous()
    cos, sin, y = cos.contiguous(), sin.contiguous(), torch.empty_like(x)
    B, H, T, d = x.shape
    getattr(library(), f"rotate_{NAMES[x.dtype]}")(
        *(tensor.data_ptr() for tensor in (x, cos, sin, y)),
        *(B, H, T, d, cos.shape[-1]),
        *x.stride()[:3],
        -1.0 if back else 1.0,
        threads(x.numel()),
    )
    return y

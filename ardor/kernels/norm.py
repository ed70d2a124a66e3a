"""The compiled root-mean-square norm. Call it where `native.available(x)`.

Axes: D model width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import NAMES, library, threads


def forward(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows 1"]]:
    """(the normalised x times the weight, 1 / rms of each row).

    A float32 weight on a bfloat16 x is the late cast; else weight has the dtype of x.
    """
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    getattr(library(), f"rms_norm_{_kind(x, weight)}")(
        *(tensor.data_ptr() for tensor in (x, weight, y, inverse)),
        inverse.numel(),
        x.shape[-1],
        eps,
        threads(x.numel()),
    )
    return y, inverse


def backward(
    dy: Float[Tensor, "*rows D"],
    x: Float[Tensor, "*rows D"],
    weight: Float[Tensor, "D"],
    inverse: Float[Tensor, "*rows 1"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "D"]]:
    """(dx, d weight in float32)"""
    dy, x, dx = dy.contiguous(), x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    count = threads(x.numel())
    sums = torch.zeros(count, x.shape[-1])
    getattr(library(), f"rms_norm_backward_{_kind(x, weight)}")(
        *(tensor.data_ptr() for tensor in (dy, x, weight, inverse, dx, sums)),
        inverse.numel(),
        x.shape[-1],
        count,
    )
    return dx, sums.sum(0)


def _kind(x: Tensor, weight: Tensor) -> str:
    return NAMES[x.dtype] if weight.dtype == x.dtype else f"late_{NAMES[x.dtype]}"

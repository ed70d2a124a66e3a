"""The compiled root-mean-square norm, where there is one.

Axes: D model width.
"""

from ctypes import c_float, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import library

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def available(x: Tensor) -> bool:
    """Whether `forward` and `backward` can take a tensor like x."""
    compiling = torch.compiler.is_compiling()  # then the torch path is traced and fused
    on_cpu = x.device.type == "cpu" and x.dtype in NAMES
    return on_cpu and not compiling and library() is not None


def forward(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows 1"]]:
    """(the normalised x times the weight, 1 / rms of each row); weight has the dtype of x."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    width = x.shape[-1]
    getattr(library(), f"rms_norm_{NAMES[x.dtype]}")(
        *map(_at, (x, weight, y, inverse)),
        c_int64(x.numel() // width),
        c_int64(width),
        c_float(eps),
        torch.get_num_threads(),
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
    width, threads = x.shape[-1], torch.get_num_threads()
    sums = torch.zeros(threads, width)
    getattr(library(), f"rms_norm_backward_{NAMES[x.dtype]}")(
        *map(_at, (dy, x, weight, inverse, dx, sums)),
        c_int64(x.numel() // width),
        c_int64(width),
        threads,
    )
    return dx, sums.sum(0)


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())

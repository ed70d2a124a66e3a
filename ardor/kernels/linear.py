"""y = x W^T + b, by whichever of equal paths is fastest for its shape.

Axes: rows of x, in and out channels.
"""

from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import library

FUNCTIONS = {torch.bfloat16: "matvec_bfloat16", torch.float32: "matvec_float32"}


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*rows out"]:
    """F.linear. One row on a CPU, where no gradient is wanted, goes through our own product.

    One row is bound by reading the weight, and neither oneDNN nor PyTorch reads at the speed of
    memory on every processor (docs/LOG.md). Sums are float32 in another order: results agree to the
    rounding of the dtype.
    """
    if (
        x.numel() == weight.shape[1]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and weight.is_contiguous()
        and (out := matvec(x, weight, bias)) is not None
    ):
        return out
    return F.linear(x, weight, bias)


def matvec(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*rows out"] | None:
    """The product of the only row of x, or None if there is no compiled function for it."""
    functions = library()
    if functions is None or x.dtype not in FUNCTIONS:
        return None
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    function = getattr(functions, FUNCTIONS[x.dtype])
    function(
        c_void_p(weight.data_ptr()),
        c_void_p(x.data_ptr()),
        None if bias is None else c_void_p(bias.data_ptr()),
        c_void_p(y.data_ptr()),
        c_int64(weight.shape[0]),
        c_int64(weight.shape[1]),
        torch.get_num_threads(),
    )
    return y

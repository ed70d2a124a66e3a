"""y = x W^T + b, by whichever of equal paths is fastest for its shape.

Axes: rows of x, in and out channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float
from torch import Tensor

from ardor.kernels.native import library


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*rows out"]:
    """F.linear. One bfloat16 row on a CPU, where no gradient is wanted, takes our own product.

    One row is bound by reading the weight, and neither oneDNN nor PyTorch reads bfloat16 at the
    speed of memory (docs/LOG.md); float32 they do. Sums are float32 in another order: results agree
    to the rounding of bfloat16.
    """
    if (
        x.numel() == weight.shape[1]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and weight.is_contiguous()
        and library() is not None
    ):
        return matvec(x, weight, bias)
    return F.linear(x, weight, bias)


def matvec(
    x: BFloat16[Tensor, "*rows in"],
    weight: BFloat16[Tensor, "out in"],
    bias: BFloat16[Tensor, "out"] | None,
) -> BFloat16[Tensor, "*rows out"]:
    """The product of the only row of x, compiled. Call it where `library()` is not None."""
    x, y = x.contiguous(), torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    functions = library()
    assert functions is not None
    functions.matvec_bfloat16(
        weight.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *weight.shape,
        torch.get_num_threads(),
    )
    return y

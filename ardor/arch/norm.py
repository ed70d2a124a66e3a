"""Axes: D model width."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch.spec import Norm as NormSpec
from ardor.kernels import norm as kernel
from ardor.kernels.native import available


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*rows D"]:
    """x / rms(x) in float32, cast to the dtype of x, then times the weight. The reference.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the order of the casts is Llama's.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    unit = F.rms_norm(x.to(work), x.shape[-1:], eps=eps).to(x.dtype)
    return unit * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm`, with half the passes over memory and nothing kept but its input."""

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return _normalised(x, self.weight, self.eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # With u = x / rms and g = upstream * weight:  dx = (g - u * mean(g * u)) / rms
        (dy,) = upstream
        x, weight, inverse = ctx.saved_tensors
        local, trained = weight.to(x.dtype), ctx.needs_input_grad[1]
        if available(x):
            dx, d_weight = kernel.backward(dy, x, local, inverse)
            return dx, d_weight.to(weight.dtype) if trained else None, None
        unit = _times(x, inverse)
        product = dy * unit
        along = (product @ local[:, None]).to(inverse.dtype).div_(x.shape[-1])  # (*rows, 1)
        dx = torch.addcmul((dy * local).to(inverse.dtype), unit, along, value=-1)
        dx = dx.mul_(inverse).to(x.dtype)
        if not trained:
            return dx, None, None
        d_weight = product.flatten(0, -2).sum(0, dtype=inverse.dtype)
        return dx, d_weight.to(weight.dtype), None


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x, 1 / rms of each row)"""
    local = weight.to(x.dtype)
    if available(x):
        return kernel.forward(x, local, eps)
    work = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=work)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (*rows, 1)
    return _times(x, inverse).mul_(local), inverse


def _times(x: Tensor, inverse: Tensor) -> Tensor:
    """x * inverse in the dtype of `inverse`, rounded once to that of x, in one pass."""
    return torch.mul(x, inverse, out=torch.empty_like(x))


class LayerNorm(nn.Module):
    """(x - mean) / std in float32, times the weight plus the bias. Source: arXiv:1607.06450."""

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), bias, self.eps)


def norm(width: int, spec: NormSpec) -> RMSNorm | LayerNorm:
    return RMSNorm(width, spec) if spec.kind == "rms" else LayerNorm(width, spec)

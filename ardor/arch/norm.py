"""Axes: D model width."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch.spec import Norm as NormSpec
from ardor.kernels import norm as kernel
from ardor.kernels.native import available


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float, late_cast: bool = False
) -> Float[Tensor, "*rows D"]:
    """x / rms(x) in float32, cast to the dtype of x, then times the weight. The reference.

    With `late_cast` the product, too, is in float32, and cast last.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the order of the casts is Llama's, and with
    `late_cast` that of Gemma and OLMo 2.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    unit = F.rms_norm(x.to(work), x.shape[-1:], eps=eps)
    if late_cast:
        return (unit * weight.to(work)).to(x.dtype)
    return unit.to(x.dtype) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm`, with half the passes over memory and nothing kept but its input."""

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.spec = spec
        has_weight = spec.weight != "none"
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        spec, weight = self.spec, self.weight
        if weight is None:
            weight = x.new_ones(x.shape[-1])
        elif spec.weight == "one_plus":
            weight = 1.0 + weight.to(torch.promote_types(x.dtype, torch.float32))
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, spec.eps, spec.late_cast)
        return _normalised(x, _local(weight, x, spec.late_cast), spec.eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, late_cast: bool) -> Tensor:
        y, inverse = _normalised(x, _local(weight, x, late_cast), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.late_cast = late_cast
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # With u = x / rms and g = upstream * weight:  dx = (g - u * mean(g * u)) / rms
        (dy,) = upstream
        x, weight, inverse = ctx.saved_tensors
        local, trained = _local(weight, x, ctx.late_cast), ctx.needs_input_grad[1]
        if available(x):
            dx, d_weight = kernel.backward(dy, x, local, inverse)
            return dx, d_weight.to(weight.dtype) if trained else None, None, None
        unit = _times(x, inverse, local.dtype)
        product = dy * unit
        along = (product @ local[:, None]).to(inverse.dtype).div_(x.shape[-1])  # (*rows, 1)
        dx = torch.addcmul((dy * local).to(inverse.dtype), unit, along, value=-1)
        dx = dx.mul_(inverse).to(x.dtype)
        if not trained:
            return dx, None, None, None
        d_weight = product.flatten(0, -2).sum(0, dtype=inverse.dtype)
        return dx, d_weight.to(weight.dtype), None, None


def _local(weight: Tensor, x: Tensor, late_cast: bool) -> Tensor:
    """The weight in the dtype that its product with the normalised x is made in."""
    return weight.to(torch.promote_types(x.dtype, torch.float32) if late_cast else x.dtype)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x, 1 / rms of each row); the weight has the dtype of their product."""
    if available(x):
        return kernel.forward(x, weight, eps)
    work = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=work)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (*rows, 1)
    return _times(x, inverse, weight.dtype).mul_(weight).to(x.dtype), inverse


def _times(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """x * inverse in the dtype of `inverse`, rounded once to `dtype`, in one pass."""
    return torch.mul(x, inverse, out=torch.empty_like(x, dtype=dtype))


class LayerNorm(nn.Module):
    """(x - mean) / std in float32, times the weight plus the bias. Source: arXiv:1607.06450."""

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.spec = spec
        has_weight = spec.weight != "none"
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if weight is not None and self.spec.weight == "one_plus":
            weight = 1.0 + weight
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.spec.eps)


class HeadNorm(nn.Module):
    """The norm of every head's channels, each head with weights of its own.

    Axes: H heads, d head width.
    """

    def __init__(self, heads: int, width: int, spec: NormSpec):
        super().__init__()
        self.unit = norm(width, replace(spec, weight="none"))
        self.weight = nn.Parameter(torch.empty(heads, width))

    def forward(self, x: Float[Tensor, "*rows H d"]) -> Float[Tensor, "*rows H d"]:
        work = torch.promote_types(x.dtype, torch.float32)
        return (self.unit(x.to(work)) * self.weight.to(work)).to(x.dtype)


def norm(width: int, spec: NormSpec) -> RMSNorm | LayerNorm:
    return RMSNorm(width, spec) if spec.kind == "rms" else LayerNorm(width, spec)

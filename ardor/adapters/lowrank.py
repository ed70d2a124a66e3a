"""The two thin products of an adapter, by whichever of equal paths is fastest for their shape.

Axes: n rows, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ardor.kernels import thin


def lowered(x: Float[Tensor, "n in"], a: Float[Tensor, "R in"]) -> Float[Tensor, "n R"]:
    """A x, computed in x.dtype. Compiled, A's gradient is not rounded to it."""
    if thin.takes(x, len(a)):
        return _Lowered.apply(x, a) if torch.is_grad_enabled() else thin.dots(x, a.to(x.dtype))
    return F.linear(x, a.to(x.dtype))


def added(
    y: Float[Tensor, "n out"], low: Float[Tensor, "n R"], b: Float[Tensor, "out R"], scale: float
) -> Float[Tensor, "n out"]:
    """y + scale * low B^T in one pass, rounded once; in the memory of y, a base's fresh output.

    Not where y is a view: autograd lets nobody write to one that a custom function has returned.
    """
    fresh = not y._is_view()
    if thin.takes(y, b.shape[1]) and y.is_contiguous():
        if torch.is_grad_enabled():
            return _Added.apply(y, low, b, scale, fresh)
        return thin.add(y, low, _turned(b, y.dtype), scale, out=y if fresh else None)
    add = Tensor.addmm_ if fresh else torch.addmm
    return add(y, low, b.to(y.dtype).T, alpha=scale)


def adapted(
    base: nn.Module,
    x: Float[Tensor, "n in"],
    a: Float[Tensor, "R in"],
    b: Float[Tensor, "out R"],
    scale: float,
) -> Float[Tensor, "n out"]:
    """base(x) + scale * B A x, where `base` is frozen; one function both ways if base can be."""
    if torch.is_grad_enabled() and thin.takes(x, len(a)) and thin.fits(len(b)) and _bare(base):
        return _BaseAndAdapter.apply(x, a, b, base, scale)
    low = lowered(x, a)
    return added(base(x), low, b, scale)


def _bare(base: nn.Module) -> bool:
    """Whether it can give the slope in x by itself: frozen, not watched, its weight not moved."""
    hooks = base._forward_hooks, base._forward_pre_hooks, base._backward_hooks
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return hasattr(base, "back") and frozen and not any(hooks)


def _turned(b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(b.T.shape, dtype=dtype).copy_(b.T)  # in half the time of contiguous()


def _kept(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the way back reads of A or B: a parameter, which is there anyway, or else its cast."""
    return factor if factor.is_leaf or factor._is_view() else factor.to(dtype)


class _Lowered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.dtype = a.dtype
        ctx.save_for_backward(x, _kept(a, x.dtype))
        return thin.dots(x, a.to(x.dtype))

    @staticmethod
    @once_differentiable
    # The decorator's type forgets the name of `ctx`.
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (slope,), (x, a) = upstream, ctx.saved_tensors
        of_x, of_a = ctx.needs_input_grad
        return (
            thin.add(None, slope, a.to(x.dtype)) if of_x else None,
            thin.outer(x, slope).to(ctx.dtype) if of_a else None,
        )


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
        ctx.dtype, ctx.scale = b.dtype, scale
        ctx.save_for_backward(low, _kept(b, y.dtype))
        if fresh:
            ctx.mark_dirty(y)
        return thin.add(y, low, _turned(b, y.dtype), scale, out=y if fresh else None)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,), (low, b) = upstream, ctx.saved_tensors
        of_low, of_b = ctx.needs_input_grad[1:3]
        return (
            slope,
            thin.dots(slope, _turned(b, low.dtype), ctx.scale) if of_low else None,
            thin.outer(slope, low, ctx.scale).T.to(ctx.dtype) if of_b else None,
            None,
            None,
        )


class _BaseAndAdapter(torch.autograd.Function):
    """The base's product and the two above: slopes in x are summed where they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Any, scale: float) -> Tensor:
        ctx.base, ctx.scale, ctx.dtypes = base, scale, (a.dtype, b.dtype)
        low, y = thin.dots(x, a.to(x.dtype)), base(x)
        ctx.save_for_backward(x, low, _kept(a, x.dtype), _kept(b, x.dtype))
        return thin.add(y, low, _turned(b, x.dtype), scale, out=y)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,), (x, low, a, b) = upstream, ctx.saved_tensors
        of_x, of_a, of_b = ctx.needs_input_grad[:3]
        d_x = ctx.base.back(slope) if of_x else None
        of_low = thin.dots(slope, _turned(b, x.dtype), ctx.scale)
        if d_x is not None:
            thin.add(d_x, of_low, a.to(x.dtype), out=d_x)
        d_a = thin.outer(x, of_low).to(ctx.dtypes[0]) if of_a else None
        d_b = thin.outer(slope, low, ctx.scale).T.to(ctx.dtypes[1]) if of_b else None
        return d_x, d_a, d_b, None, None

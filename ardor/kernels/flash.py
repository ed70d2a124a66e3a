"""Causal attention in blocks, compiled, with its gradient; for processors that multiply bfloat16.

Axes: B batch rows, T positions, H query heads, K kv heads, d head width.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from ardor.kernels.native import available, library

FEWEST = 32  # positions: what is shorter fills too little of a block of 64 (docs/LOG.md)
EVERYWHERE = 1 << 40  # as a window or chunk: longer than any text


class How(NamedTuple):
    """What the softmax sees of the product of a query and a key, and which keys those are."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    chunk: int | None = None
    slopes: Float[Tensor, "H"] | None = None  # ALiBi's, per position of distance


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash` is there and the fastest for such heads on this machine.

    It is at every width, although heads are filled up to whole tiles of 64 channels inside.
    """
    width = q.shape[-1]
    return (
        q.dtype == k.dtype == v.dtype == torch.bfloat16
        and width == v.shape[-1]
        and width % 2 == 0
        and q.shape[2] >= FEWEST
        # A kv head of a row is one thread's work. Each is worth two or three of PyTorch's.
        and 2 * q.shape[0] * k.shape[1] >= torch.get_num_threads()
        and available(q)
        and hasattr(library(), "flash_forward")
    )


def flash(
    q: BFloat16[Tensor, "B H T d"],
    k: BFloat16[Tensor, "B K T d"],
    v: BFloat16[Tensor, "B K T d"],
    how: How,
    sinks: Float[Tensor, "H"] | None = None,
) -> BFloat16[Tensor, "B H T d"]:
    """Position t of each row reads positions 0 .. t of it, as far as `how` lets it reach.

    Call it where `takes(q, k, v)`. Inside, tensors are [B, T, heads, d]: views of the projections,
    which nobody has to copy. Double backward is not supported.

    Source: Dao 2023, arXiv:2307.08691, sections 3.1.1 and 3.1.2.
    """
    inner = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return _Flash.apply(*inner, sinks, how).transpose(1, 2)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: How
    ) -> Tensor:
        B, T, H, _ = q.shape
        out, log_sums = torch.empty_like(q), torch.empty((B, H, T), dtype=torch.float32)
        _run("flash_forward", (q, k, v, out, log_sums), sinks, how)
        ctx.save_for_backward(q, k, v, sinks, out, log_sums)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_sums = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        d_out = upstream[0].contiguous()
        _run("flash_backward", (q, k, v, out, d_out, log_sums, *gradients), sinks, ctx.how)
        d_sinks = None
        if ctx.needs_input_grad[3]:
            # The sink's weight at each position; its value is zero, so its slope is minus the mean.
            shares = (sinks.float()[:, None] - log_sums * math.log(2)).exp()  # (B, H, T)
            along = (d_out.float() * out.float()).sum(-1).mT
            d_sinks = -(shares * along).sum((0, 2)).to(sinks.dtype)
        return *gradients, d_sinks, None


def _run(name: str, tensors: tuple[Tensor, ...], sinks: Tensor | None, how: How) -> None:
    """Call the function `name`, with scratch for each thread; the tensors begin with q and k."""
    functions, threads = library(), torch.get_num_threads()
    assert functions is not None
    (B, T, H, d), K = tensors[0].shape, tensors[1].shape[2]
    scratch = torch.empty(threads * functions.flash_scratch(T, d), dtype=torch.float32)
    heads = [None if x is None else x.detach().float().contiguous() for x in (how.slopes, sinks)]
    getattr(functions, name)(
        *(x.data_ptr() for x in (*tensors, scratch)),
        *(None if x is None else x.data_ptr() for x in heads),
        *(B, T, H, K, d),
        *(how.window or EVERYWHERE, how.chunk or EVERYWHERE),
        how.scale,
        how.softcap or 0.0,
        threads,
    )

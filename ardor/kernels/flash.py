"""Causal attention in blocks, compiled, with its gradient; for processors that multiply bfloat16.

Axes: B batch rows, T positions, H query heads, K kv heads, d head width.
"""

from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor

from ardor.kernels.native import available, library

WIDTHS = 64  # head widths are whole multiples of this, as the kernel's tiles are
FEWEST = 32  # positions: what is shorter fills too little of a block of 64 (docs/LOG.md)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash` is there and the fastest for such heads on this machine."""
    return (
        q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % WIDTHS == 0
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
    *,
    scale: float,
) -> BFloat16[Tensor, "B H T d"]:
    """Position t of each row reads positions 0 .. t. Call it where `takes(q, k, v)`.

    Inside, tensors are [B, T, heads, d]: views of the projections, which nobody has to copy.

    Source: Dao 2023, arXiv:2307.08691, sections 3.1.1 and 3.1.2.
    """
    return _Flash.apply(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), scale).transpose(1, 2)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        B, T, H, _ = q.shape
        out, log_sums = torch.empty_like(q), torch.empty((B, H, T), dtype=torch.float32)
        _run("flash_forward", (q, k, v, out, log_sums), scale)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        _run(
            "flash_backward",
            (q, k, v, out, upstream[0].contiguous(), log_sums, *gradients),
            ctx.scale,
        )
        return *gradients, None


def _run(name: str, tensors: tuple[Tensor, ...], scale: float) -> None:
    """Call the function `name`, with scratch for each thread; the tensors begin with q and k."""
    functions, threads = library(), torch.get_num_threads()
    assert functions is not None
    (B, T, H, d), K = tensors[0].shape, tensors[1].shape[2]
    scratch = torch.empty(threads * functions.flash_scratch(T, d), dtype=torch.float32)
    getattr(functions, name)(
        *(x.data_ptr() for x in (*tensors, scratch)), *(B, T, H, K, d), scale, threads
    )

"""The masked next-token cross-entropy, summed: whoever steps the optimizer divides, once.

Axes: B batch, T positions, N rows of hidden states, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100  # a target that teaches nothing: prompt, or the last position of a document

CHUNK_BYTES = 8 << 20  # of float32 logits alive at a time; about what a core's caches hold


class LossSum(NamedTuple):
    nats: Float[Tensor, ""]  # summed, not averaged: the trainer divides once per optimizer step
    targets: Int[Tensor, ""]  # how many positions were counted


def next_token_loss(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> LossSum:
    """Negative log-likelihood; `targets[b, t]` is the token that follows position t, or IGNORE.

    This is sum_i M_i * -log p(x_i | x_<i) with M_i = 1 where a target is not IGNORE. The reference
    for `chunked_next_token_loss`.
    """
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()  # (B*T, V), (B*T,)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return LossSum(nats, (targets != IGNORE).sum())


def chunked_next_token_loss(
    hidden: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    head: Callable[[Tensor], Tensor],
    head_parameters: tuple[Tensor, ...],
    *,
    chunk: int | None = None,
) -> LossSum:
    """`next_token_loss(head(hidden), targets)` that never holds [tokens, vocab].

    Positions whose target is IGNORE are not multiplied with the head at all. The rest go through
    `head` ([n, D] -> [n, V]) `chunk` rows at a time; where a gradient is wanted it is taken in the
    same pass, for `hidden` and for `head_parameters` (those `head` trains), so that no logits
    outlive their chunk in either direction. Double backward is not supported.

    Source: the idea of gradients in the forward pass is Hsu et al. 2024, arXiv:2410.10989, 3.2.
    """
    kept = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if len(kept) < len(rows):
        rows, wanted = rows.index_select(0, kept), wanted.index_select(0, kept)
    wants = torch.is_grad_enabled()
    trained = tuple(p for p in head_parameters if wants and p.requires_grad)
    nats = _ChunkedLoss.apply(head, chunk, rows, wanted, *trained)
    return LossSum(nats, torch.tensor(len(kept), device=targets.device))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        chunk: int | None,
        rows: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        *parameters: Tensor,
    ) -> Float[Tensor, ""]:
        total = torch.zeros((), device=rows.device, dtype=torch.float32)
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[2] else None
        d_parameters = [torch.zeros_like(p) for p in parameters]
        start = 0
        while start < len(rows):
            # The first chunk is one row only when nobody said otherwise: it tells V.
            stop = min(len(rows), start + (chunk or 1))
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                piece = rows[start:stop].detach().requires_grad_(d_rows is not None)
                logits = head(piece)
                loss = F.cross_entropy(logits.float(), targets[start:stop], reduction="sum")
            if d_rows is not None or parameters:
                inputs = ([piece] if d_rows is not None else []) + list(parameters)
                gradients = list(torch.autograd.grad(loss, inputs))
                if d_rows is not None:
                    d_rows[start:stop] = gradients.pop(0)
                for sum_, part in zip(d_parameters, gradients, strict=True):
                    sum_ += part
            total += loss.detach()
            chunk = chunk or max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
            start = stop
        ctx.save_for_backward(d_rows, *d_parameters)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, *d_parameters = ctx.saved_tensors
        (factor,) = upstream
        scaled = None if d_rows is None else d_rows * factor.to(d_rows.dtype)
        return (None, None, scaled, None, *(d * factor for d in d_parameters))

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

Head = Callable[..., Tensor]
"""(states [n, D], *parameters) -> logits [n, V]"""

CHUNK_BYTES = 16 << 20  # of float32 logits alive at a time; about what a core's caches hold


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
    head: Head,
    parameters: tuple[Tensor, ...],
    *,
    chunk: int | None = None,
) -> LossSum:
    """`next_token_loss(head(hidden, *parameters), targets)` that never holds [tokens, vocab].

    Positions whose target is IGNORE are not multiplied with the head at all. The rest go through
    `head` ([n, D] -> [n, V]) `chunk` rows at a time, with `parameters` cast once to their dtype;
    where a gradient is wanted, of `hidden` or of a parameter, it is taken in the same pass and
    summed in the parameter's own dtype, so that no logits outlive their chunk in either direction.
    Double backward is not supported.

    Source: the idea of gradients in the forward pass is Hsu et al. 2024, arXiv:2410.10989, 3.2.
    """
    kept = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if len(kept) < len(rows):
        rows, wanted = rows.index_select(0, kept), wanted.index_select(0, kept)
    if not torch.is_grad_enabled():
        rows, parameters = rows.detach(), tuple(p.detach() for p in parameters)
    nats = _ChunkedLoss.apply(head, chunk, rows, wanted, *parameters)
    return LossSum(nats, torch.tensor(len(kept), device=targets.device))


def chunked_token_logprobs(
    hidden: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    head: Head,
    parameters: tuple[Tensor, ...],
    *,
    chunk: int | None = None,
) -> Float[Tensor, "N"]:
    """log p of each target that is not IGNORE, in order, in nats; never holds [tokens, vocab].

    For losses that weigh tokens differently: how much each counts is known in the backward pass
    only, so logits are computed in both, `chunk` rows at a time. Double backward is not supported.
    """
    kept = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows, wanted = hidden.flatten(0, 1)[kept], targets.flatten()[kept]
    return _ChunkedLogprobs.apply(head, chunk, rows, wanted, *parameters)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        chunk: int | None,
        rows: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        *parameters: Tensor,
    ) -> Float[Tensor, "N"]:
        cast = [p.detach().to(rows.dtype) for p in parameters]
        found, start = [torch.zeros(0, device=rows.device)], 0
        while start < len(rows):
            stop = start + (chunk or 1)  # one row only when nobody said otherwise: it tells V
            log_p = head(rows[start:stop], *cast).float().log_softmax(-1)
            found.append(log_p.gather(-1, targets[start:stop, None])[:, 0])
            chunk = chunk or max(1, CHUNK_BYTES // (4 * log_p.shape[-1]))
            start = stop
        ctx.head, ctx.chunk = head, chunk
        ctx.save_for_backward(rows, targets, *parameters)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = upstream
        rows, targets, *parameters = ctx.saved_tensors
        wants_rows, wants = ctx.needs_input_grad[2], ctx.needs_input_grad[4:]
        leaves = [
            p.detach().to(rows.dtype).requires_grad_(wanted)
            for p, wanted in zip(parameters, wants, strict=True)
        ]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        d_rows = torch.empty_like(rows) if wants_rows else None
        sums = [torch.zeros_like(p) for p, wanted in zip(parameters, wants, strict=True) if wanted]
        for start in range(0, len(rows), ctx.chunk or 1):
            piece = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                part = rows[piece].detach().requires_grad_(wants_rows)
                logits = ctx.head(part, *leaves)
            index, weight = targets[piece, None], weights[piece, None].float()
            # d log p / d logits = onehot(target) - softmax
            slope = logits.detach().float().softmax(-1).mul_(-weight)
            slope = slope.scatter_add_(-1, index, weight)
            inputs = [part, *trained] if wants_rows else trained
            found = list(torch.autograd.grad(logits, inputs, slope.to(logits.dtype)))
            if d_rows is not None:
                d_rows[piece] = found.pop(0)
            for sum_, gradient in zip(sums, found, strict=True):
                sum_ += gradient
        left = iter(sums)
        return (None, None, d_rows, None, *(next(left) if wanted else None for wanted in wants))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        chunk: int | None,
        rows: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        *parameters: Tensor,
    ) -> Float[Tensor, ""]:
        wants_rows, *wants = ctx.needs_input_grad[2], *ctx.needs_input_grad[4:]
        leaves = [
            p.detach().to(rows.dtype).requires_grad_(wanted)
            for p, wanted in zip(parameters, wants, strict=True)
        ]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        total = torch.zeros((), device=rows.device, dtype=torch.float32)
        d_rows = torch.empty_like(rows) if wants_rows else None
        sums = [
            torch.zeros_like(p) if wanted else None
            for p, wanted in zip(parameters, wants, strict=True)
        ]
        minus_one = torch.full((1, 1), -1.0, device=rows.device)
        start = 0
        while start < len(rows):
            # The first chunk is one row only when nobody said otherwise: it tells V.
            stop = min(len(rows), start + (chunk or 1))
            with torch.set_grad_enabled(bool(wants_rows or trained)):
                piece = rows[start:stop].detach().requires_grad_(wants_rows)
                logits = head(piece, *leaves)
            index = targets[start:stop, None]
            log_p = logits.detach().float().log_softmax(-1)
            total -= log_p.gather(-1, index).sum()
            if logits.requires_grad:
                # d nats / d logits = softmax - onehot(target), in the memory of log_p
                slope = log_p.exp_().scatter_add_(-1, index, minus_one.expand_as(index))
                inputs = [piece, *trained] if wants_rows else trained
                gradients = list(torch.autograd.grad(logits, inputs, slope.to(logits.dtype)))
                if d_rows is not None:
                    d_rows[start:stop] = gradients.pop(0)
                for sum_, part in zip((s for s in sums if s is not None), gradients, strict=True):
                    sum_ += part
            chunk = chunk or max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
            start = stop
        ctx.save_for_backward(d_rows, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = upstream
        d_rows, *sums = (
            None if saved is None else saved * factor.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return (None, None, d_rows, None, *sums)

"""The masked next-token cross-entropy, summed: whoever steps the optimizer divides, once.

Axes: B batch, T positions, N rows of hidden states, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
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


class _Pieces:
    """`head` of a few rows at a time, and what is summed over them: gradients of what wants one.

    Iterating gives (which rows, their logits); `add` takes the slope of the loss in these logits.
    """

    def __init__(
        self,
        head: Head,
        chunk: int | None,
        rows: Float[Tensor, "N D"],
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],  # of the rows, then of each parameter
    ):
        self.head, self.chunk, self.rows = head, chunk, rows
        self._wants_rows, *wants = wanted
        self._leaves = [
            p.detach().to(rows.dtype).requires_grad_(wants_it)
            for p, wants_it in zip(parameters, wants, strict=True)
        ]
        self._inputs = [leaf for leaf in self._leaves if leaf.requires_grad]
        self.d_rows = torch.empty_like(rows) if self._wants_rows else None
        self.sums = [
            torch.zeros_like(p) if wants_it else None
            for p, wants_it in zip(parameters, wants, strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "n V"]]]:
        start = 0
        while start < len(self.rows):
            # The first chunk is one row only when nobody said otherwise: it tells V.
            piece = slice(start, min(len(self.rows), start + (self.chunk or 1)))
            with torch.set_grad_enabled(bool(self._wants_rows or self._inputs)):
                self._part = self.rows[piece].detach().requires_grad_(self._wants_rows)
                logits = self.head(self._part, *self._leaves)
            yield piece, logits
            self.chunk = self.chunk or max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
            start = piece.stop

    def add(self, piece: slice, logits: Float[Tensor, "n V"], slope: Float[Tensor, "n V"]) -> None:
        inputs = [self._part, *self._inputs] if self._wants_rows else self._inputs
        gradients = list(torch.autograd.grad(logits, inputs, slope.to(logits.dtype)))
        if self.d_rows is not None:
            self.d_rows[piece] = gradients.pop(0)
        for sum_, gradient in zip((s for s in self.sums if s is not None), gradients, strict=True):
            sum_ += gradient


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
        pieces = _Pieces(head, chunk, rows, parameters, (False,) * (1 + len(parameters)))
        found = [torch.zeros(0, device=rows.device)]
        for piece, logits in pieces:
            log_p = logits.float().log_softmax(-1)
            found.append(log_p.gather(-1, targets[piece, None])[:, 0])
        ctx.head, ctx.chunk = head, pieces.chunk
        ctx.save_for_backward(rows, targets, *parameters)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = upstream
        rows, targets, *parameters = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
        pieces = _Pieces(ctx.head, ctx.chunk, rows, parameters, wanted)
        for piece, logits in pieces:
            index, weight = targets[piece, None], weights[piece, None].float()
            # d log p / d logits = onehot(target) - softmax
            slope = logits.detach().float().softmax(-1).mul_(-weight)
            pieces.add(piece, logits, slope.scatter_add_(-1, index, weight))
        return (None, None, pieces.d_rows, None, *pieces.sums)


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
        wanted = (ctx.needs_input_grad[2], *ctx.needs_input_grad[4:])
        pieces = _Pieces(head, chunk, rows, parameters, wanted)
        total = torch.zeros((), device=rows.device, dtype=torch.float32)
        minus_one = torch.full((1, 1), -1.0, device=rows.device)
        for piece, logits in pieces:
            index = targets[piece, None]
            log_p = logits.detach().float().log_softmax(-1)
            total -= log_p.gather(-1, index).sum()
            if logits.requires_grad:
                # d nats / d logits = softmax - onehot(target), in the memory of log_p
                slope = log_p.exp_().scatter_add_(-1, index, minus_one.expand_as(index))
                pieces.add(piece, logits, slope)
        ctx.save_for_backward(pieces.d_rows, *pieces.sums)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = upstream
        d_rows, *sums = (
            None if saved is None else saved * factor.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return (None, None, d_rows, None, *sums)

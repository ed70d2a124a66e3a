"""The masked next-token cross-entropy, summed: whoever steps the optimizer divides, once.

Axes: B batch, T positions, N rows of hidden states, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ardor.kernels import entropy

IGNORE = -100  # a target that teaches nothing: prompt, or the last position of a document

Head = Callable[..., Tensor]
"""(states [n, D], *parameters) -> logits [n, V]; one with a `finish`, as arch.linear.LinearHead has
it, is states W^T + b of its parameters W and perhaps b, and `finish` of that if it is not None."""

# Of logits and what is made of them, alive at a time: on a CPU products of 256 and more rows are as
# fast as any; a GPU wants thousands to be busy.
CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES = 32 << 20, 512 << 20
# Zeros fill the last rows up to a multiple of this, and to one of so many numbers between a power
# of two and the next. Some counts, like 511, divide into blocks so badly that a product takes half
# as long again; and oneDNN compiles three products for each count that it meets, whose small blocks
# of memory, here and there in the heap, let it grow by half.
ROWS, SIZES = 8, 16
TILE_BYTES = 4 << 20  # of a weight's gradient that is made at a time


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
    known: int | None = None,
    chunk: int | None = None,
    share: float | None = None,
) -> LossSum:
    """`next_token_loss(head(hidden, *parameters), targets)` that never holds [tokens, vocab].

    Positions whose target is IGNORE are not multiplied with the head at all. The rest go through
    `head` ([n, D] -> [n, V]) `chunk` rows at a time, with `parameters` cast once to their dtype;
    where a gradient is wanted, of `hidden` or of a parameter, it is taken in the same pass and
    summed in the parameter's own dtype, so that no logits outlive their chunk in either direction.
    Ids from `known` on belong to no token: their logits count as -inf. Double backward is not
    supported.

    With `share`, gradients of leaves are summed where earlier ones are: what `.grad` holds is taken
    away now, and comes back as a part of this gradient. Then the loss must be differentiated, by
    `backward` and times `share`, and what autograd.grad would say of a leaf holds the earlier ones.

    Raises: RuntimeError in the backward pass, if it is differentiated times something else.
    Source: the idea of gradients in the forward pass is Hsu et al. 2024, arXiv:2410.10989, 3.2.
    """
    kept = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if len(kept) < len(rows):
        rows, wanted = rows.index_select(0, kept), wanted.index_select(0, kept)
    if not torch.is_grad_enabled():
        rows, parameters = rows.detach(), tuple(p.detach() for p in parameters)
    nats = _ChunkedLoss.apply(head, known, chunk, share, rows, wanted, *parameters)
    return LossSum(nats, torch.tensor(len(kept), device=targets.device))


def chunked_token_logprobs(
    hidden: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    head: Head,
    parameters: tuple[Tensor, ...],
    *,
    known: int | None = None,
    chunk: int | None = None,
    accumulate: bool = False,
) -> Float[Tensor, "N"]:
    """log p of each target that is not IGNORE, in order, in nats; never holds [tokens, vocab].

    For losses that weigh tokens differently: how much each counts is known in the backward pass
    only, so logits are computed in both, `chunk` rows at a time. `known` as above. Double backward
    is not supported. With `accumulate`, gradients of leaves are summed where earlier ones are, as
    above, but only in the backward pass.
    """
    kept = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows, wanted = hidden.flatten(0, 1)[kept], targets.flatten()[kept]
    return _ChunkedLogprobs.apply(head, known, chunk, accumulate, rows, wanted, *parameters)


def token_nats(
    logits: Float[Tensor, "n V"],
    targets: Int[Tensor, "n"],
    slope: Float[Tensor, "n V"] | None,
    factors: Float[Tensor, "n"] | None = None,
) -> Float[Tensor, "n"]:
    """-log p of each target; `slope` takes its derivative in the logits, times the factor."""
    if entropy.takes(logits):
        return entropy.cross_entropy(logits, targets, slope, factors)
    log_p, index = logits.float().log_softmax(-1), targets[:, None]
    nats = -log_p.gather(-1, index)[:, 0]
    if slope is not None:
        # softmax - onehot(target), in the memory of log_p
        minus_one = torch.full((1, 1), -1.0, device=logits.device).expand_as(index)
        found = log_p.exp_().scatter_add_(-1, index, minus_one)
        slope.copy_(found if factors is None else found.mul_(factors[:, None]))
    return nats


class _Pieces:
    """`head` of a few rows at a time, and what is summed over them: gradients of what wants one."""

    def __init__(
        self,
        head: Head,
        known: int | None,
        chunk: int | None,
        rows: Float[Tensor, "N D"],
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],  # of the rows, then of each parameter
        *,
        share: float = 1.0,
        taken: bool = False,
    ):
        self.head, self.known, self.rows, self.share = head, known, rows, share
        self._wants_rows, *wants = wanted
        self._leaves = [
            p.detach().to(rows.dtype).requires_grad_(wants_it)
            for p, wants_it in zip(parameters, wants, strict=True)
        ]
        self._inputs = [leaf for leaf in self._leaves if leaf.requires_grad]
        self.d_rows = torch.empty_like(rows) if self._wants_rows else None
        # Times `share`, which the gradient of the rows is not.
        self.sums = [
            _begun(p, taken) if wants_it else None
            for p, wants_it in zip(parameters, wants, strict=True)
        ]
        # Nothing but a product: its slopes are written over its logits.
        self._linear = getattr(head, "finish", head) is None
        self._sheet: Tensor | None = None
        self.chunk = chunk or self._fitting()

    def nats(
        self, targets: Int[Tensor, "N"], factors: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N"]:
        """-log p of each target, in float32; where gradients are wanted, they are summed too."""
        found = torch.zeros(len(self.rows), device=self.rows.device)
        differentiated, slopes = bool(self._wants_rows or self._inputs), None
        for piece in self._slices():
            count = piece.stop - piece.start
            part = F.pad(self.rows[piece].detach(), (0, 0, 0, _filled(count) - count))
            logits, add = self._logits(part, differentiated)
            if differentiated:
                slopes = logits if self._linear else _like(logits, slopes)
            found[piece] = token_nats(
                logits.detach()[:count, : self.known],
                targets[piece],
                None if slopes is None else slopes[:count, : self.known],
                None if factors is None else factors[piece],
            )
            if slopes is not None:
                slopes[count:] = 0
                slopes[:, self.known or slopes.shape[1] :] = 0
                add(piece, slopes)
            del logits, add  # before the next ones are made
        return found

    def _logits(
        self, part: Float[Tensor, "n D"], differentiated: bool
    ) -> tuple[Float[Tensor, "n V"], Callable[[slice, Tensor], None]]:
        """Logits, and what adds up gradients when it is given their slope."""
        if not self._linear:
            part.requires_grad_(self._wants_rows)
            with torch.set_grad_enabled(differentiated):
                logits = self.head(part, *self._leaves)
            return logits, partial(self._add, part, logits)
        return self._product(part), partial(self._add_linear, part)

    @torch.no_grad()
    def _product(self, part: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """part W^T + b in the memory of the piece before."""
        weight, *bias = self._leaves
        if self._sheet is None:
            self._sheet = part.new_empty(len(part), len(weight))  # the first is the largest
        out = self._sheet[: len(part)]
        if bias:
            return torch.addmm(bias[0], part, weight.T, out=out)
        return torch.mm(part, weight.T, out=out)

    def _add(
        self,
        part: Float[Tensor, "n D"],
        logits: Float[Tensor, "n V"],
        piece: slice,
        slope: Float[Tensor, "n V"],
    ) -> None:
        inputs = [part, *self._inputs] if self._wants_rows else self._inputs
        gradients = list(torch.autograd.grad(logits, inputs, slope))
        if self.d_rows is not None:
            self.d_rows[piece] = gradients.pop(0)[: piece.stop - piece.start]
        for sum_, gradient in zip((s for s in self.sums if s is not None), gradients, strict=True):
            sum_.add_(gradient, alpha=self.share)

    def _add_linear(
        self, part: Float[Tensor, "n D"], piece: slice, slope: Float[Tensor, "n V"]
    ) -> None:
        """The same where logits are part W^T + b: no gradient as large as W is made beside its sum.

        New memory costs a page fault for each 4 KiB, which would be half of this work.
        """
        weight = self._leaves[0]
        if self.d_rows is not None:
            self.d_rows[piece] = (slope @ weight)[: piece.stop - piece.start]
        if (sum_ := self.sums[0]) is not None:
            tile = max(1, TILE_BYTES // (weight.shape[1] * weight.element_size()))
            for start in range(0, len(weight), tile):
                found = slope[:, start : start + tile].T @ part
                sum_[start : start + tile].add_(found, alpha=self.share)
        if len(self.sums) > 1 and (sum_ := self.sums[1]) is not None:
            sum_.add_(slope.sum(0), alpha=self.share)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), self.chunk):
            yield slice(start, min(len(self.rows), start + self.chunk))

    @torch.no_grad()
    def _fitting(self) -> int:
        """So many rows of logits and slopes fit a chunk, and of float32 where torch makes them."""
        none = self.head(self.rows[:0], *self._leaves)
        kept = 1 if self._linear else 2  # logits, and slopes if they are beside
        if getattr(self.head, "finish", None) is not None:
            kept += 3  # a cap's tanh, and two slopes on the way
        number = kept * none.element_size() + (0 if entropy.takes(none) else 2 * 4)
        bytes = CHUNK_BYTES if self.rows.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
        fitting = max(1, bytes // (none.shape[-1] * number))
        step = _step(fitting)
        return max(1, fitting // step * step)


def _begun(parameter: Tensor, taken: bool) -> Tensor:
    """What its gradient is added to: zeros, or if it is to be `taken`, what `.grad` holds.

    Not in 16 bits, where each addition rounds and small ones to a large sum are lost: pieces are
    added to each other before they are to those of earlier batches.
    """
    if not (taken and parameter.is_leaf and parameter.element_size() >= 4):
        return torch.zeros_like(parameter)
    held, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if held is None else held


def _like(logits: Float[Tensor, "n V"], slopes: Tensor | None) -> Float[Tensor, "n V"]:
    """Room for the slope of `logits`: that of an earlier piece, which is no smaller."""
    return torch.empty_like(logits) if slopes is None else slopes[: len(logits)]


def _filled(rows: int) -> int:
    """`rows` with those that are filled up."""
    step = _step(rows)
    return -(-rows // step) * step


def _step(rows: int) -> int:
    """Between numbers of rows that are used, about `rows`."""
    return max(ROWS, (1 << rows.bit_length() - 1) // SIZES)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        known: int | None,
        chunk: int | None,
        accumulate: bool,
        rows: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        *parameters: Tensor,
    ) -> Float[Tensor, "N"]:
        unwanted = (False,) * (1 + len(parameters))
        pieces = _Pieces(head, known, chunk, rows, parameters, unwanted)
        ctx.head, ctx.known, ctx.chunk, ctx.accumulate = head, known, pieces.chunk, accumulate
        ctx.save_for_backward(rows, targets, *parameters)
        return -pieces.nats(targets)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = upstream
        rows, targets, *parameters = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[4], *ctx.needs_input_grad[6:])
        pieces = _Pieces(
            ctx.head, ctx.known, ctx.chunk, rows, parameters, wanted, taken=ctx.accumulate
        )
        pieces.nats(targets, -weights.float())
        return (None, None, None, None, pieces.d_rows, None, *pieces.sums)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        known: int | None,
        chunk: int | None,
        share: float | None,
        rows: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        *parameters: Tensor,
    ) -> Float[Tensor, ""]:
        wanted, taken = (ctx.needs_input_grad[4], *ctx.needs_input_grad[6:]), share is not None
        pieces = _Pieces(
            head, known, chunk, rows, parameters, wanted, share=share or 1.0, taken=taken
        )
        total = pieces.nats(targets).sum()
        ctx.found, ctx.share = (pieces.d_rows, *pieces.sums), share
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("the chunked loss has been differentiated; it is only once")
        # Multiplied where they lie and given away: a head's gradient may be a gigabyte.
        (factor,), (d_rows, *sums), ctx.found = upstream, ctx.found, None
        if ctx.share is not None and not math.isclose(float(factor), ctx.share, rel_tol=1e-6):
            raise RuntimeError(
                f"the chunked loss is differentiated times {float(factor):g}, and share={ctx.share}"
            )
        for found in (d_rows, *(sums if ctx.share is None else ())):
            if found is not None:
                found.mul_(factor)
        return (None, None, None, None, d_rows, None, *sums)

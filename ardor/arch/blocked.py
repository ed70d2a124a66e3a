"""Attention with everything that fused kernels lack, block by block: never all scores at once.

Windows skip the keys that no query of a block reads; the backward pass computes the scores again.

Axes: B batch, T new positions, S keys, H query heads, K kv heads, G = H / K, d head width,
t queries of one block, n keys that they read.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch.layout import ALL, Reach

BLOCK_SCORES = 1 << 24  # alive at a time
BLOCK_QUERIES = 128  # at most: more of them read more keys that others of the block may not


class Scores(NamedTuple):
    """How the product of a query and a key becomes the score that the softmax sees."""

    scale: float
    reach: Reach = ALL
    softcap: float | None = None  # softcap * tanh(score / softcap), before the mask
    alibi: tuple[float, ...] | None = None  # per head: times the distance, which is not positive
    alibi_coarse: bool = False

    def bias(self, slopes: Tensor, distance: Tensor, key: Tensor) -> Tensor:
        """What ALiBi adds to scores, from the distance of keys or their positions.

        The coarse form differs in more than a constant for each query: bfloat16 has 8 bits, so
        far keys share a bias with their neighbours. Models trained with that know no other.
        """
        if self.alibi_coarse:
            return (slopes.bfloat16() * key).to(slopes.dtype) * self.scale
        return slopes * distance

    def plain(self, longest: int) -> bool:
        """Whether causal attention with a scale is all of it, in texts of `longest` positions."""
        return self.softcap is None and self.alibi is None and self.reach.covers(longest)


def attend_blocked(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    past: tuple[int, ...],
    scores: Scores,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """`attend` where query t of row b stands at position past[b] + t and key s at position s.

    Double backward is not supported.

    Source: the online form is that of Dao et al. 2022, arXiv:2205.14135; sinks: gpt-oss.
    """
    return _Blocked.apply(q, k, v, sinks, past, scores)


class _Block(NamedTuple):
    queries: slice
    keys: slice
    allowed: Tensor  # (#B, 1, 1, t, n)
    distance: Tensor  # (#B, 1, 1, t, n), of keys from queries


def _blocks(q: Tensor, k: Tensor, past: tuple[int, ...], reach: Reach) -> Iterator[_Block]:
    B, H, T = q.shape[:3]
    past = past[:1] if len({*past}) == 1 else past
    starts = torch.tensor(past, device=q.device)[:, None, None]
    size = min(BLOCK_QUERIES, max(1, BLOCK_SCORES // (B * H * k.shape[2])))
    for start in range(0, T, size):
        stop = min(T, start + size)
        keys = slice(reach.first(min(past) + start), max(past) + stop)
        query = starts + torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=q.device)
        allowed, distance = reach.mask(query, key), key - query
        yield _Block(slice(start, stop), keys, allowed[:, None, None], distance[:, None, None])


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        past: tuple[int, ...],
        scores: Scores,
    ) -> Tensor:
        B, H, T = q.shape[:3]
        work = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(B, H, T, v.shape[-1])
        total = q.new_empty(B, H, T, dtype=work)  # log of the sum of exponentials
        for block in _blocks(q, k, past, scores.reach):
            raw, _ = _scores(q, k, block, scores)  # (B, K, G, t, n)
            lse = raw.logsumexp(-1)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.to(work).view(1, k.shape[1], -1, 1))
            weights = raw.sub_(lse[..., None]).exp_()
            mixed = _grouped(weights, v[:, :, block.keys].to(work))
            out[:, :, block.queries] = mixed.flatten(1, 2)
            total[:, :, block.queries] = lse.flatten(1, 2)
        ctx.save_for_backward(q, k, v, sinks, out, total)
        ctx.past, ctx.scores = past, scores
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # With p the weights and D = sum(d_out * out):  d_score = p * (d_out v^T - D)
        (d_out,) = upstream
        q, k, v, sinks, out, total = ctx.saved_tensors
        scores: Scores = ctx.scores
        work, K = total.dtype, k.shape[1]
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (k, v))
        along = (d_out.to(work) * out.to(work)).sum(-1)  # D: (B, H, T)
        for block in _blocks(q, k, ctx.past, scores.reach):
            raw, slope = _scores(q, k, block, scores)
            lse, mean, up = (
                x[:, :, block.queries].to(work).unflatten(1, (K, -1)) for x in (total, along, d_out)
            )
            weights = raw.sub_(lse[..., None]).exp_()
            keys, values = (x[:, :, block.keys].to(work) for x in (k, v))
            d_v[:, :, block.keys] += weights.flatten(2, 3).mT @ up.flatten(2, 3)
            d_scores = weights.mul_(_grouped(up, values.mT).sub_(mean[..., None]))
            d_scores *= scores.scale if slope is None else slope.mul_(scores.scale)
            d_q[:, :, block.queries] = _grouped(d_scores, keys).flatten(1, 2)
            queries = q[:, :, block.queries].to(work).unflatten(1, (K, -1))
            d_k[:, :, block.keys] += d_scores.flatten(2, 3).mT @ queries.flatten(2, 3)
        d_sinks = None
        if sinks is not None:
            shares = (sinks.to(work)[:, None] - total).exp()
            d_sinks = -(shares * along).sum((0, 2)).to(sinks.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None


def _scores(
    q: Tensor, k: Tensor, block: _Block, scores: Scores
) -> tuple[Float[Tensor, "B K G t n"], Float[Tensor, "B K G t n"] | None]:
    """What the softmax sees, and the slope of the cap where there is one."""
    K, work = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    queries = q[:, :, block.queries].to(work).unflatten(1, (K, -1))
    raw = _grouped(queries, k[:, :, block.keys].to(work).mT).mul_(scores.scale)
    slope = None
    if scores.softcap is not None:
        bent = raw.div_(scores.softcap).tanh_()
        slope = 1 - bent.square()
        raw = bent * scores.softcap
    if scores.alibi is not None:
        slopes = torch.tensor(scores.alibi, dtype=work, device=q.device)
        key = torch.arange(block.keys.start, block.keys.stop, device=q.device)
        raw += scores.bias(slopes.view(1, K, -1, 1, 1), block.distance, key)
    return raw.masked_fill_(~block.allowed, -torch.inf), slope


def _grouped(x: Float[Tensor, "B K G t c"], shared: Float[Tensor, "B K c m"]) -> Tensor:
    """x @ shared, the heads of a group as rows of one product."""
    return (x.flatten(2, 3) @ shared).unflatten(2, x.shape[2:4])

"""Grouped-query attention: one readable reference; every fast backend is tested against it.

Axes: B batch, T new positions, S cached + new positions, H query heads, K kv heads, d head width,
e width of a value.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ardor.arch import spec as specs
from ardor.arch.blocked import Scores, attend_blocked
from ardor.arch.flash import flash_attention_2, lacks, why_not
from ardor.arch.flex import NO_BACKWARD, flex
from ardor.arch.layout import ALL, Cached, Layout, Packed
from ardor.errors import ConfigError, ShapeError
from ardor.kernels.attention import attend_last
from ardor.kernels.attention import takes as last_takes
from ardor.kernels.flash import How, flash
from ardor.kernels.flash import takes as flash_takes


def attend(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    allowed: Bool[Tensor, "#B #H T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """Mix `v` by how well each query matches each key.

    Position t reads position s only where `allowed`; a row with nothing allowed gives zeros.
    Scores are at least float32 whatever comes in: softcap * tanh(score / softcap) where it is
    given, plus `bias`. A head's sink is the score of one more key, whose value is zero.

    Raises: ShapeError if H is not a multiple of K.
    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.2; softcap: arXiv:2408.00118; sinks:
    Xiao et al. 2023, arXiv:2309.17453, as gpt-oss trains them.
    """
    _check_heads(q, k)
    H, K = q.shape[1], k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(H // K, dim=1).to(work) for x in (k, v))  # (B, H, S, d)

    scores = q.to(work) @ k.mT * scale  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # Not -inf: a row with nothing allowed would become NaN, in its gradient too.
    scores = scores.masked_fill(~allowed, torch.finfo(work).min)
    if sinks is not None:
        column = sinks.to(work)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.masked_fill(~allowed, 0.0) @ v).to(q.dtype)


def eager(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    layout: Layout,
    scores: Scores,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """The reference: the dense mask of `layout`, all scores computed."""
    bias = None
    if scores.alibi is not None:
        work = torch.promote_types(q.dtype, torch.float32)
        slopes = torch.tensor(scores.alibi, dtype=work, device=q.device)[:, None, None]
        distance = layout.distances(q.device)
        bias = scores.bias(
            slopes, distance, distance + layout.positions(q.device)[:, None, :, None]
        )
    return attend(
        q,
        k,
        v,
        layout.allowed(q.device, scores.reach),
        scale=scores.scale,
        softcap=scores.softcap,
        bias=bias,
        sinks=sinks,
    )


def sdpa(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    layout: Layout,
    scores: Scores,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """`eager` on PyTorch's fused kernels; masked-out document blocks are never computed.

    What those kernels lack (soft caps, sinks, ALiBi, windows) goes block by block.
    """
    _check_heads(q, k)
    if isinstance(layout, Cached):
        return _sdpa_cached(q, k, v, layout, scores, sinks)
    if len(layout.runs) == 1:
        return _causal(q, k, v, layout.runs[0], scores, sinks)
    return _by_runs(q, k, v, layout, partial(_causal, scores=scores, sinks=sinks))


def _check_heads(q: Tensor, k: Tensor) -> None:
    H, K = q.shape[1], k.shape[1]
    if H % K:
        raise ShapeError(f"{H} query heads cannot share {K} kv heads; make H a multiple of K")


def _by_runs(
    q: Tensor, k: Tensor, v: Tensor, layout: Packed, attend_run: Callable[..., Tensor]
) -> Tensor:
    """Each run of equally long documents apart, as a batch of its own."""
    rows = q.shape[0]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B*T, heads, d)
    outs = []
    for start, count, length in layout.runs:
        q, k, v = (
            x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for x in flat
        )
        out = attend_run(q, k, v, (0, count, length))  # (count, H, length, e)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).unflatten(0, (rows, -1)).transpose(1, 2)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run: tuple[int, int, int],
    scores: Scores,
    sinks: Tensor | None,
) -> Float[Tensor, "B H T d"]:
    """Causal attention in each of `count` equally long documents that tile the rows."""
    rows, heads = q.shape[:2]
    count, length = run[1:]
    if count != rows:  # several documents a row: they become rows of their own
        q, k, v = (
            x.transpose(1, 2).reshape(count, length, x.shape[1], -1).transpose(1, 2)
            for x in (q, k, v)
        )
    if flash_takes(q, k, v) and not scores.alibi_coarse:
        out = flash(q, k, v, _how(scores, length), sinks)
    elif sinks is not None or not scores.plain(length):
        out = attend_blocked(q, k, v, (0,) * count, scores, sinks)
    else:
        out = F.scaled_dot_product_attention(
            q, *_shared(k, v, heads), is_causal=length > 1, scale=scores.scale
        )
    if count != rows:
        out = out.transpose(1, 2).reshape(rows, -1, heads, out.shape[-1]).transpose(1, 2)
    return out


def _how(scores: Scores, longest: int) -> How:
    reach = scores.reach if not scores.reach.covers(longest) else ALL
    slopes = None if scores.alibi is None else torch.tensor(scores.alibi)
    return How(scores.scale, scores.softcap, reach.window, reach.chunk, slopes)


def _sdpa_cached(
    q: Tensor, k: Tensor, v: Tensor, layout: Cached, scores: Scores, sinks: Tensor | None
) -> Float[Tensor, "B H T d"]:
    B, H, T, d = q.shape
    if layout.even and layout.past[0] == 0:
        return _causal(q, k, v, (0, B, T), scores, sinks)
    if last_takes(q, k, v) and not scores.alibi_coarse:
        reads = [(scores.reach.first(past), past + 1) for past in layout.past]
        slopes = None if scores.alibi is None else torch.tensor(scores.alibi)
        return attend_last(
            q,
            k,
            v,
            reads,
            scale=scores.scale,
            softcap=scores.softcap,
            slopes=slopes,
            sinks=sinks,
        )
    if sinks is not None or not scores.plain(layout.longest):
        return attend_blocked(q, k, v, layout.past, scores, sinks)
    if T == 1:
        # The heads of a group read the same keys: as rows of one query block nothing is copied.
        q = q.view(B, k.shape[1], -1, d)
        mask = None if layout.even else layout.allowed(q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale).view(B, H, 1, -1)
    return F.scaled_dot_product_attention(
        q, *_shared(k, v, H), layout.allowed(q.device), scale=scores.scale
    )


def _shared(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for each query head of their group."""
    times = heads // k.shape[1]
    if times == 1:
        return k, v
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


Backend = Callable[..., Tensor]

BACKENDS: Mapping[str, Backend] = {
    "eager": eager,
    "sdpa": sdpa,
    "flex": flex,
    "flash_attention_2": flash_attention_2,
}


class Choice(NamedTuple):
    name: str  # of a backend
    why: str  # for people


def backend_for(
    asked: str | None,
    device: torch.device,
    *,
    spec: specs.Decoder | None = None,
    compute: torch.dtype = torch.float32,
    trains: bool = False,
) -> Choice:
    """The backend to use on `device`: as asked, or the best that is there for `spec`.

    Raises: ConfigError for one that is unknown, or cannot run there, or cannot train.
    """
    if asked is None:
        return _best(device, spec, compute)
    if asked not in BACKENDS:
        raise ConfigError(
            f"attn_implementation={asked!r} is not one of {', '.join(BACKENDS)}; "
            "leave it out to let Ardor choose"
        )
    if asked == "flash_attention_2" and (reason := why_not(device)) is not None:
        raise ConfigError(
            f"attn_implementation='flash_attention_2': {reason}; use 'sdpa', or leave it out"
        )
    if asked == "flex" and trains and device.type == "cpu":
        raise ConfigError(NO_BACKWARD)
    return Choice(asked, "as asked")


def _best(device: torch.device, spec: specs.Decoder | None, compute: torch.dtype) -> Choice:
    if device.type == "cpu":
        return Choice("sdpa", "the fused kernels of a CPU")
    missing = why_not(device)
    if missing is None and compute not in (torch.float16, torch.bfloat16):
        missing = f"flash-attn does not compute in {compute}"
    if missing is None and spec is not None:
        missing = next(filter(None, (lacks(layer.mixer) for layer in spec.layers)), None)
    if missing is None and spec is not None:
        return Choice("flash_attention_2", "flash-attn is there, and does all that the model needs")
    # Not flex, even for what the fused kernels lack: it compiles for every new form of batch, and
    # makes a mask for every token that is decoded. Whoever trains long enough asks for it.
    return Choice("sdpa", missing or "nothing is known of the model")

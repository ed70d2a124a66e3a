"""Attention as PyTorch's FlexAttention compiles it: everything in one fused kernel on a GPU.

Axes as in `attention`.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch.blocked import Scores
from ardor.arch.layout import Cached, Layout
from ardor.errors import ConfigError

NO_BACKWARD = "attn_implementation='flex' has no backward pass on a CPU; train there with sdpa"


def flex(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    layout: Layout,
    scores: Scores,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """`eager` by FlexAttention; compiled where there is a GPU, uncompiled and slow elsewhere.

    Raises: ConfigError where a gradient is wanted on a CPU, for which PyTorch has none.
    Source: Dong et al. 2024, arXiv:2412.05496.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise ConfigError(NO_BACKWARD)
    bend = _bending(scores, layout, q.device)
    mask = _mask(scores, layout, q.device)
    out, beside = _function(q.device.type)(
        q,
        k,
        v,
        score_mod=bend,
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=_package().AuxRequest(lse=True),
    )
    if sinks is None:
        return out
    # One more key of value zero: what the others give shrinks by its share.
    shares = (beside.lse - sinks.to(beside.lse.dtype)[:, None]).sigmoid()  # (B, H, T)
    return out * shares[..., None].to(out.dtype)


def _package() -> Any:
    return import_module("torch.nn.attention.flex_attention")  # 0.15 s that few need


@cache
def _function(device: str) -> Callable[..., Any]:
    plain = _package().flex_attention
    return plain if device == "cpu" else torch.compile(plain, dynamic=True)


def _bending(scores: Scores, layout: Layout, device: torch.device) -> Callable[..., Tensor] | None:
    """What becomes of a score."""
    cap = scores.softcap
    if cap is None and scores.alibi is None:
        return None
    positions = layout.positions(device)
    keys = positions if not isinstance(layout, Cached) else None
    slopes = torch.tensor(scores.alibi or (), device=device)

    def bend(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if scores.alibi is not None:
            key = s if keys is None else keys[b, s]
            score = score + scores.bias(slopes[h], key - positions[b, t], key)
        return score

    return bend


def _mask(scores: Scores, layout: Layout, device: torch.device) -> Any:
    """Which blocks of the scores are computed at all, and what counts in them."""
    positions, reach = layout.positions(device), scores.reach
    rows, new = positions.shape
    make = _package().create_block_mask
    if isinstance(layout, Cached):
        return make(
            lambda b, h, t, s: reach.mask(positions[b, t], s),
            *(rows, None, new, layout.longest),
            device=str(device),
        )
    documents = layout.documents(device)
    return make(
        lambda b, h, t, s: (
            (documents[b, t] == documents[b, s]) & reach.mask(positions[b, t], positions[b, s])
        ),
        *(rows, None, new, new),
        device=str(device),
    )

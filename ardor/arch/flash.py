"""Attention by the flash-attn package, where it and a GPU that it knows are there.

Axes as in `attention`.
"""

from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch import spec as specs
from ardor.arch.blocked import Scores
from ardor.arch.layout import Cached, Layout
from ardor.errors import ConfigError

OLDEST = (8, 0)  # Ampere
WIDEST = 256  # of a head


def flash_attention_2(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S e"],
    layout: Layout,
    scores: Scores,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T e"]:
    """`eager` by FlashAttention-2, documents end to end without padding; float16 and bfloat16.

    Raises: ConfigError for what that package lacks (sinks, chunks, rounded ALiBi), and for float32.
    Source: Dao 2023, arXiv:2307.08691; the package's own interface.
    """
    _refuse(q, scores, sinks)
    package = import_module("flash_attn")
    window = (-1, -1) if scores.reach.window is None else (scores.reach.window - 1, 0)
    slopes = None
    if scores.alibi is not None:
        slopes = torch.tensor(scores.alibi, dtype=torch.float32, device=q.device)
    how: dict[str, Any] = {
        "softmax_scale": scores.scale,
        "causal": True,
        "window_size": window,
        "softcap": scores.softcap or 0.0,
        "alibi_slopes": slopes,
    }
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, d), as the package wants it
    if isinstance(layout, Cached):
        lengths = torch.tensor(layout.past, dtype=torch.int32, device=q.device) + layout.new
        out = package.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **how)
        return out.transpose(1, 2)
    rows = q.shape[0]
    ends = accumulate((length for row in layout.lengths for length in row), initial=0)
    borders = torch.tensor([*ends], dtype=torch.int32, device=q.device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    longest = layout.longest
    out = package.flash_attn_varlen_func(*flat, borders, borders, longest, longest, **how)
    return out.unflatten(0, (rows, -1)).transpose(1, 2)


def _refuse(q: Tensor, scores: Scores, sinks: Tensor | None) -> None:
    missing = None
    if sinks is not None:
        missing = "attention sinks"
    elif scores.reach.chunk is not None:
        missing = "chunks"
    elif scores.alibi_coarse:
        missing = "the rounding of ALiBi"
    elif q.dtype not in (torch.float16, torch.bfloat16):
        missing = f"{q.dtype} (load with dtype='bfloat16')"
    if missing is not None:
        raise ConfigError(f"flash_attention_2 cannot do {missing}; use attn_implementation='sdpa'")


def lacks(mixer: specs.Attention | specs.LatentAttention) -> str | None:
    """What attention of this kind needs that the package has not; None if it has everything."""
    if isinstance(mixer, specs.LatentAttention):
        return "flash-attn wants values as wide as keys, and latent attention has others"
    if mixer.sinks:
        return "flash-attn has no attention sinks"
    if mixer.chunk is not None:
        return "flash-attn has no chunks"
    if mixer.alibi_coarse:
        return "flash-attn does not round ALiBi as this model does"
    if mixer.head_width > WIDEST:
        return f"flash-attn takes heads up to {WIDEST} wide, and these are {mixer.head_width}"
    return None


def why_not(device: torch.device) -> str | None:
    """What is missing to use it on `device`; None if nothing is."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    return None

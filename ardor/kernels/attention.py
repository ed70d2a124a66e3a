"""Attention of the newest position of every row over its cache, compiled.

Axes: B batch rows, S positions of the longest row, H query heads, K kv heads, d head width.
"""

from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import NAMES, available, library, threads


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_last` can stand in for the reference: no gradient wanted, and its layout."""
    return (
        available(q)
        and not torch.is_grad_enabled()
        and q.shape[2] == 1
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and k.stride() == v.stride()
        and k.stride(-1) == 1
    )


def attend_last(
    q: Float[Tensor, "B H 1 d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S d"],
    reads: Sequence[tuple[int, int]],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    sinks: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H 1 d"]:
    """Row b stands at the last of the positions reads[b] = (first, end) of k and v that it reads.

    `slopes` are ALiBi's, times the distance to that last one; the rest as in `arch.attend`.
    """
    q = q.contiguous()
    (B, H, _, d), (_, K, S, _) = q.shape, k.shape
    functions, group = library(), H // K
    assert functions is not None
    firsts, ends = (array("q", side) for side in zip(*reads, strict=True))
    perhead = [None if x is None else x.detach().float().contiguous() for x in (slopes, sinks)]
    each = functions.attend_last_scratch(group, d, S)
    out, scratch = torch.empty_like(q), torch.empty(B * K * each, dtype=torch.float32)
    getattr(functions, f"attend_last_{NAMES[q.dtype]}")(
        *(tensor.data_ptr() for tensor in (q, k, v, out, scratch)),
        *(side.buffer_info()[0] for side in (firsts, ends)),
        *(None if x is None else x.data_ptr() for x in perhead),
        *(B, K, group, d, each),
        *k.stride()[:3],
        scale,
        softcap or 0.0,
        threads(B * H * S * d),
    )
    return out

"""Gated feed-forwards of many rows, compiled; for processors that multiply bfloat16.

Axes: N rows, D model width, F ffn width, E experts, k experts per row.
"""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from ardor.kernels.gate import Act
from ardor.kernels.native import available, library

TILE = 16  # both widths are multiples of it
FEWEST = 8  # rows: a half of a tile is filled up


class Routes(NamedTuple):
    """Which rows each expert reads, sorted by expert, and what their results count."""

    rows: Int[Tensor, "Nk"]
    weights: Float[Tensor, "Nk"]  # float32
    counts: list[int]  # of each expert


def takes(x: Float[Tensor, "N D"], *weights: Tensor) -> bool:
    """Whether `gated_mlp` can stand in for these products: no gradient wanted, and its shapes."""
    return (
        len(x) >= FEWEST
        and not torch.is_grad_enabled()
        and x.dtype == torch.bfloat16
        and available(x)
        and hasattr(library(), "gated_mlp")
        and all(w.dtype == x.dtype and w.is_contiguous() for w in weights)
        and not any(size % TILE for size in weights[0].shape[-2:])
    )


def gated_mlp(
    act: Act,
    x: BFloat16[Tensor, "N D"],
    gate: BFloat16[Tensor, "*E F D"],
    up: BFloat16[Tensor, "*E F D"],
    down: BFloat16[Tensor, "*E D F"],
    routes: Routes | None = None,
) -> BFloat16[Tensor, "N D"]:
    """down (act(gate x) * up x); with `routes` the weighted sum of it over each row's experts.

    Call it where `takes(x, gate, up, down)`. What lies between is rounded once, after the gate.
    """
    functions, x = library(), x.contiguous()
    assert functions is not None
    inner, width = gate.shape[-2:]
    counts = [len(x)] if routes is None else routes.counts
    sorted_by_expert = None if routes is None else routes.rows.contiguous()
    shares = None if routes is None else routes.weights.float().contiguous()
    each = torch.tensor(counts)
    out = torch.zeros(x.shape, dtype=torch.float32)
    room = functions.gated_mlp_scratch(max(counts), width, inner)
    scratch = torch.empty(room, dtype=torch.int32)
    functions.gated_mlp(
        x.data_ptr(),
        *(None if t is None else t.data_ptr() for t in (sorted_by_expert, shares)),
        *(t.data_ptr() for t in (each, gate, up, down, out, scratch)),
        *(len(counts), width, inner),
        int(act == "gelu"),
        torch.get_num_threads(),
    )
    return out.to(x.dtype)

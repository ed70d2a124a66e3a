"""How tokens come in: as rows of a table, and as a narrow vector for each layer.

Axes: B batch rows, T positions, D model width, L layers, P width of a layer's vector.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.linear import Linear
from ardor.arch.mlp import ACTIVATIONS
from ardor.arch.norm import norm


class Embedding(nn.Module):
    """Row `id` of the weight for every id."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return F.embedding(ids, self.weight)


def scaled(x: Tensor, scale: float, table: nn.Module) -> Tensor:
    """x * scale, rounded as the weights of the table are: what such models were trained with."""
    # An adapted table makes its whole weight when asked for it; what it was has the dtype too.
    held: Any = getattr(table, "base_weight", None)
    dtype = cast(Tensor, table.weight).dtype if held is None else held.dtype
    return x * torch.tensor(scale, dtype=dtype, device=x.device).to(x.dtype)


class TokenInputs(nn.Module):
    """The vectors of all layers, from a token and from its embedding; see `spec.TokenInput`."""

    def __init__(self, width: int, layers: int, spec: specs.TokenInput):
        super().__init__()
        self.spec, self.layers = spec, layers
        self.embed = Embedding(spec.rows, layers * spec.width)
        self.context_proj = Linear(width, layers * spec.width)
        self.context_norm = norm(spec.width, spec.norm)

    def forward(
        self, ids: Int[Tensor, "B T"], embedded: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "L B T P"]:
        own = scaled(self.embed(ids).to(embedded.dtype), self.spec.width**0.5, self.embed)
        context = self.context_proj(embedded) * embedded.shape[-1] ** -0.5
        own, context = (x.unflatten(-1, (self.layers, -1)) for x in (own, context))
        return ((self.context_norm(context) + own) * 2**-0.5).movedim(2, 0)


class TokenGate(nn.Module):
    """What one layer adds last, gated by its vector."""

    def __init__(self, width: int, spec: specs.TokenInput):
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.gate_proj = Linear(width, spec.width)
        self.out_proj = Linear(spec.width, width)
        self.out_norm = norm(width, spec.norm)

    def forward(
        self, x: Float[Tensor, "B T D"], vector: Float[Tensor, "B T P"]
    ) -> Float[Tensor, "B T D"]:
        return self.out_norm(self.out_proj(self.act(self.gate_proj(x)) * vector))

"""Axes: D model width, F ffn width."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.gate import gated
from ardor.arch.linear import Linear

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activated(
    spec: specs.Mlp, gate: Float[Tensor, "*rows F"] | None, up: Float[Tensor, "*rows F"]
) -> Float[Tensor, "*rows F"]:
    """act(gate) * up when gated, act(up) when not; with the spec's limits and shift."""
    act = ACTIVATIONS[spec.act]
    if gate is None:
        return act(up)
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.shift:
        up = up + spec.shift
    return gated(act, gate, up)


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) when not."""

    def __init__(self, width: int, spec: specs.Mlp):
        super().__init__()
        self.spec = spec
        self.gate_proj = Linear(width, spec.width, bias=spec.bias) if spec.gated else None
        self.up_proj = Linear(width, spec.width, bias=spec.bias)
        self.down_proj = Linear(spec.width, width, bias=spec.bias)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(activated(self.spec, gate, self.up_proj(x)))

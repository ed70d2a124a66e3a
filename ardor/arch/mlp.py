"""Axes: D model width, F ffn width."""

from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.gate import ACTIVATIONS, gated
from ardor.arch.linear import Linear


def activated(
    spec: specs.Mlp, gate: Float[Tensor, "*rows F"] | None, up: Float[Tensor, "*rows F"]
) -> Float[Tensor, "*rows F"]:
    """act(gate) * up when gated, act(up) when not; with the spec's limits and shift."""
    if gate is None:
        return ACTIVATIONS[spec.act](up)
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.shift:
        up = up + spec.shift
    return gated(spec.act, gate, up)


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

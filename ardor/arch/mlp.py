"""Axes: D model width, F ffn width."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.gate import ACTIVATIONS, COMPILED, gated
from ardor.arch.linear import Linear
from ardor.kernels.mlp import gated_mlp, takes


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


Fused = Callable[..., Tensor]


def fused(
    spec: specs.Mlp, x: Float[Tensor, "N D"], parts: Sequence[Any], kind: type
) -> Fused | None:
    """x through gate, up and down as one compiled function, where `parts` are plain and it can be.

    `kind` is the type of a part that nothing has wrapped or quantized.
    """
    act = COMPILED.get(spec.act)
    if act is None or not spec.gated or spec.bias or spec.limit is not None or spec.shift:
        return None
    if not all(type(part) is kind for part in parts):
        return None
    if any(part._forward_pre_hooks or part._forward_hooks for part in parts):
        return None  # whoever watches a part is to see what goes through it
    gate, up, down = (part.weight for part in parts)
    return partial(gated_mlp, act, x, gate, up, down) if takes(x, gate, up, down) else None


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) when not."""

    def __init__(self, width: int, spec: specs.Mlp):
        super().__init__()
        self.spec = spec
        self.gate_proj = Linear(width, spec.width, bias=spec.bias) if spec.gated else None
        self.up_proj = Linear(width, spec.width, bias=spec.bias)
        self.down_proj = Linear(spec.width, width, bias=spec.bias)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        rows = x.reshape(-1, x.shape[-1])
        at_once = fused(self.spec, rows, (self.gate_proj, self.up_proj, self.down_proj), Linear)
        if at_once is not None:
            return at_once().view(x.shape)
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(activated(self.spec, gate, self.up_proj(x)))

"""The same linear map of every expert, each quantized by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.quant.linear import KeepsDtypes
from ardor.quant.packed import PackedWeight


class QuantizedExperts(KeepsDtypes):
    """In place of `arch.experts`' dense map: storage of all experts one above the other. Frozen.

    `joined` says that files hold all experts in one tensor, which no quantized layout has.
    """

    bias: nn.Parameter | None  # (E, out)

    def __init__(
        self, weights: Sequence[PackedWeight], bias: nn.Parameter | None, *, joined: bool = False
    ):
        super().__init__()
        first = weights[0]
        self.joined, self.count = joined, len(weights)
        self.outputs, self.inputs = first.shape
        self.register_parameter("bias", bias)
        self._kind: Any = type(first)
        self._facts = {n: part for n, part in first.parts.items() if not isinstance(part, Tensor)}
        for name in first.storage:
            self.register_buffer(name, torch.stack([one.storage[name] for one in weights]))

    def weight(self, expert: int) -> PackedWeight:
        """One expert's weight, sharing memory."""
        held = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return self._kind(**self._facts, **{name: tensor[expert] for name, tensor in held.items()})

    def of(self, expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """x W~^T + b of one expert, in the dtype of x."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        return self.weight(expert).product(x, bias)

    def dequantized(self, dtype: torch.dtype | None = None) -> Float[Tensor, "E out in"]:
        """All maps as a new tensor, rounded once to `dtype` (None: what was quantized)."""
        return torch.stack([self.weight(e).dequantize(dtype) for e in range(self.count)])

    def extra_repr(self) -> str:
        outputs, inputs = self.weight(0).shape
        return f"{self.count} x ({inputs} -> {outputs}), {self._kind.__name__}"

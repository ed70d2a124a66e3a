"""MXFP4: blocks of 32 four-bit floats that share a power of two, as gpt-oss's experts come.

Axes: E experts, F outputs, nb blocks of 32 inputs.
Source: OCP Microscaling Formats specification 1.0, section 5.3; the layout is that of gpt-oss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ardor.quant.linear import DequantizedLinear

BLOCK = 32  # numbers that share a scale
# A sign, two bits of exponent, one of mantissa (E2M1).
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*_POSITIVE, *(-level for level in _POSITIVE))
_BIAS = 127  # of the exponent that a scale is


@dataclass(frozen=True, eq=False, slots=True)
class MXFP4Weight:
    """4.25 bits per number: number 2j of a block is the low half of byte j, 2j + 1 the high."""

    blocks: UInt8[Tensor, "*rows nb 16"]
    scales: UInt8[Tensor, "*rows nb"]

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "*rows in"]:
        """The numbers in their order, rounded once to `dtype`: exact in float32 and bfloat16."""
        levels = torch.tensor(LEVELS, device=self.blocks.device)
        halves = torch.stack([self.blocks & 15, self.blocks >> 4], -1)  # (*rows, nb, 16, 2)
        numbers = levels[halves.int()].flatten(-2)
        exponents = (self.scales.int() - _BIAS)[..., None]
        return torch.ldexp(numbers, exponents).flatten(-2).to(dtype)


class MXFP4Experts(nn.Module):
    """The same linear map of every expert, kept as it came; in place of `arch.experts`' dense one.

    One expert at a time is expanded for the moment of its product, and again on the way back.
    Frozen, with its bias.
    """

    blocks: Tensor  # (E, F, nb, 16)
    scales: Tensor  # (E, F, nb)
    bias: nn.Parameter | None  # (E, F)

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool):
        super().__init__()
        self.count, self.inputs, self.outputs = count, inputs, outputs
        shape = (count, outputs, inputs // BLOCK)
        self.register_buffer("blocks", torch.empty(*shape, BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(shape, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(count, outputs)) if bias else None

    def of(self, expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """x W^T + b of one expert, in the dtype of x."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        weight = MXFP4Weight(self.blocks[expert], self.scales[expert])
        return DequantizedLinear.apply(x, weight, bias)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "E out in"]:
        """All maps, rounded once to `dtype`."""
        return MXFP4Weight(self.blocks, self.scales).dequantize(dtype)

    def extra_repr(self) -> str:
        count, outputs, blocks = self.scales.shape
        return f"{count} x ({blocks * BLOCK} -> {outputs}), bias={self.bias is not None}, mxfp4"


def hold_mxfp4(decoder: nn.Module, name: str) -> None:
    """Put a module that holds MXFP4 in the place of the dense map of all experts at `name`."""
    dense = decoder.get_submodule(name)
    weight = dense.get_parameter("weight")  # (E, out, in)
    count, outputs, inputs = weight.shape
    with weight.device:
        packed = MXFP4Experts(count, inputs, outputs, bias=dense.bias is not None)
    decoder.set_submodule(name, packed)

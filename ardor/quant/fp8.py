"""FP8: numbers of eight bits (E4M3) with a scale for each block of rows and columns.

DeepSeek V3 was trained so; others are published so. Products are computed in the dtype of what is
multiplied: nothing is rounded to eight bits on its way in, as GPUs do for speed.

Axes: E experts, F outputs, nb blocks along an axis; the last one may be cut short.
Source: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3; E4M3: arXiv:2209.05433.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch.linear import Linear
from ardor.errors import CheckpointError
from ardor.quant.linear import DequantizedLinear, KeepsDtypes, StoredLinear

_SCALES = "_scale_inv"  # added to the name of a weight in files
Block = tuple[int, int] | None  # rows and columns that share a scale; None: the whole matrix does


@dataclass(frozen=True, eq=False, slots=True)
class FP8Weight:
    """A matrix: each number times the scale of its block."""

    packed: Tensor  # (out, in), float8_e4m3fn
    scales: Tensor  # (nb, nb), or () for the whole
    block: Block

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The products in float32, rounded once to `dtype`."""
        numbers, scales = self.packed.float(), self.scales.float()
        if self.block is None:
            return numbers.mul_(scales).to(dtype)
        rows, columns = self.block
        tall = scales.repeat_interleave(rows, 0)[: len(numbers)]  # (out, nb)
        whole = numbers.shape[1] // columns
        # Through a view: scales for every number would double the memory.
        numbers[:, : whole * columns].unflatten(1, (whole, columns)).mul_(tall[:, :whole, None])
        numbers[:, whole * columns :].mul_(tall[:, whole:])
        return numbers.to(dtype)


class FP8Linear(StoredLinear):
    """y = x W^T + b in the dtype of x, with W kept as it came and expanded for each product."""

    packed: Tensor  # (out, in)
    scales: Tensor
    original_dtype = torch.bfloat16  # what such weights are expanded to where nobody says

    def __init__(self, inputs: int, outputs: int, block: Block, *, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs, self.block = inputs, outputs, block
        self.register_buffer("packed", torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn))
        self.register_buffer("scales", torch.empty(_grid(outputs, inputs, block)))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def dequantized(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        weight = FP8Weight(self.packed, self.scales, self.block)
        return weight.dequantize(dtype or self.original_dtype)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return DequantizedLinear.apply(x, FP8Weight(self.packed, self.scales, self.block), bias)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}, fp8"


class FP8Experts(KeepsDtypes):
    """The same linear map of every expert, kept as it came; one at a time is expanded."""

    packed: Tensor  # (E, F, in)
    scales: Tensor  # (E, nb, nb), or (E,)
    bias: nn.Parameter | None  # (E, F)

    def __init__(self, count: int, inputs: int, outputs: int, block: Block, *, bias: bool):
        super().__init__()
        self.count, self.inputs, self.outputs = count, inputs, outputs
        self.block = block
        numbers = torch.empty(count, outputs, inputs, dtype=torch.float8_e4m3fn)
        self.register_buffer("packed", numbers)
        self.register_buffer("scales", torch.empty(count, *_grid(outputs, inputs, block)))
        self.bias = nn.Parameter(torch.empty(count, outputs)) if bias else None

    def of(self, expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """x W^T + b of one expert, in the dtype of x."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        weight = FP8Weight(self.packed[expert], self.scales[expert], self.block)
        return DequantizedLinear.apply(x, weight, bias)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "E out in"]:
        """All maps, rounded once to `dtype`."""
        pairs = zip(self.packed, self.scales, strict=True)
        return torch.stack([FP8Weight(*pair, self.block).dequantize(dtype) for pair in pairs])

    def extra_repr(self) -> str:
        count, outputs, inputs = self.packed.shape
        return f"{count} x ({inputs} -> {outputs}), bias={self.bias is not None}, fp8"


def hold_fp8(decoder: nn.Module, name: str, block: Block) -> None:
    """Put a module that holds FP8 in the place of the linear map, or of all experts', at `name`.

    Raises: CheckpointError if there is something else.
    """
    dense = decoder.get_submodule(name)
    weight = dense.get_parameter("weight")
    bias = getattr(dense, "bias", None) is not None
    with weight.device:
        if isinstance(dense, Linear):
            packed: nn.Module = FP8Linear(dense.inputs, dense.outputs, block, bias=bias)
        elif weight.ndim == 3:
            count, outputs, inputs = weight.shape
            packed = FP8Experts(count, inputs, outputs, block, bias=bias)
        else:
            raise CheckpointError(
                f"the checkpoint holds {name} in FP8, which only linear maps can be held in; "
                "load the checkpoint it was made from"
            )
    decoder.set_submodule(name, packed)


def expand_pairs(tensors: Mapping[str, Tensor], block: Block) -> dict[str, Tensor]:
    """Tensors of a file by name: those beside their scales in bfloat16, and the scales gone."""
    found = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}{_SCALES}")
        if scales is not None:
            found[name] = FP8Weight(tensor, scales, block).dequantize(torch.bfloat16)
        elif not name.endswith((_SCALES, ".activation_scale")):
            found[name] = tensor
    return found


def _grid(outputs: int, inputs: int, block: Block) -> tuple[int, ...]:
    """The shape of the scales of a matrix: a block at the end may be cut short."""
    if block is None:
        return ()
    return (-(-outputs // block[0]), -(-inputs // block[1]))

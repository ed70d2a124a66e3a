"""Integers of 8 or 4 bits with a scale and a zero for every group of inputs: Ardor's own format.

Each group spans the range of its weights, so that it wastes no code on a sign that it lacks; zero
is always one of the numbers, so that pruned weights stay what they are.

Axes: g groups of each output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from ardor.errors import CheckpointError, ShapeError
from ardor.quant.packed import PackedWeight, Rows, not_finite

_CHUNK = 1 << 20  # weights at a time


@dataclass(frozen=True, eq=False)
class GroupWeight(PackedWeight):
    """(code - zero) * scale: `bits`, and 40 for every group.

    Codes of 4 bits lie two in a byte, input 2j in its low half. The last group may be short.
    """

    packed: UInt8[Tensor, "out bytes"]
    scales: Float32[Tensor, "out g"]
    zeros: UInt8[Tensor, "out g"]
    bits: int
    group: int  # inputs that share a scale and a zero
    original_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, count = self.packed.shape
        return (outputs, count * 8 // self.bits)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        outputs, inputs = self.shape
        out = torch.empty(self.shape, dtype=dtype or self.original_dtype, device=self.packed.device)
        step = max(1, _CHUNK // inputs)
        for first in range(0, outputs, step):
            rows = slice(first, first + step)
            codes = _unpacked(self.packed[rows], self.bits)
            padded = F.pad(codes, (0, -inputs % self.group)).unflatten(1, (-1, self.group))
            numbers = padded.float().sub_(self.zeros[rows, :, None])
            out[rows] = numbers.mul_(self.scales[rows, :, None]).flatten(1)[:, :inputs]
        return out

    def rows(self, rows: Rows) -> "GroupWeight":
        packed, scales, zeros = map(rows.of, (self.packed, self.scales, self.zeros))
        return GroupWeight(packed, scales, zeros, self.bits, self.group, self.original_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """In files codes have a third axis, of one: no reader takes them for a dense weight."""
        return {
            "weight": self.packed[..., None],
            "weight_scales": self.scales,
            "weight_zeros": self.zeros,
        }

    def reread(self, found: Mapping[str, Tensor], name: str) -> "GroupWeight":
        return GroupWeight.from_tensors(found, name, self.bits, self.group, self.original_dtype)

    @classmethod
    def from_tensors(
        cls, found: Mapping[str, Tensor], name: str, bits: int, group: int, dtype: torch.dtype
    ) -> "GroupWeight":
        """The inverse of `tensors`; `name` is for errors.

        Raises: CheckpointError if a tensor is missing, or of another dtype or size.
        """
        needed = {"weight": torch.uint8, "weight_scales": torch.float32}
        needed |= {"weight_zeros": torch.uint8}
        if missing := sorted(needed.keys() - found.keys()):
            raise CheckpointError(
                f"{name} is not a complete int{bits} weight: found {sorted(found)}, "
                f"missing {missing}"
            )
        packed, scales, zeros = (found[key] for key in needed)
        outputs, inputs = len(packed), packed.numel() // max(1, len(packed)) * 8 // bits
        grid = (outputs, -(-inputs // group))
        dtypes = [found[key].dtype for key in needed]
        if dtypes != [*needed.values()] or not grid == scales.shape == zeros.shape:
            raise CheckpointError(
                f"{name}: found scales of shape {list(scales.shape)} and zeros of "
                f"{list(zeros.shape)} in {dtypes}; int{bits} in groups of {group} has {list(grid)} "
                "of each; quantize the original checkpoint again"
            )
        return cls(packed.view(outputs, -1), scales, zeros, bits, group, dtype)

    def error_bound(self) -> Float32[Tensor, "out g"]:
        """The largest |weight - dequantized float32 weight| possible in each group.

        Half a step, also at the ends of the range: the zero is off by at most half a step too, and
        towards one end only. The last term covers the float32 rounding.
        """
        levels = 2**self.bits - 1
        return self.scales * (0.5 + 4 * levels * torch.finfo(torch.float32).eps)


def quantize_groups(weight: Float[Tensor, "out in"], bits: int, group: int) -> GroupWeight:
    """The nearest of 2^bits - 1 steps over the range of each group and zero.

    Raises: ShapeError unless it is a matrix whose outputs fill whole bytes, CheckpointError for
    NaN or infinity.
    """
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] * bits % 8:
        raise ShapeError(
            f"int{bits} holds matrices with whole bytes for each output, found a weight of shape "
            f"{tuple(weight.shape)}"
        )
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    device = weight.device
    packed = torch.empty(outputs, inputs * bits // 8, dtype=torch.uint8, device=device)
    scales = torch.empty(outputs, groups, dtype=torch.float32, device=device)
    zeros = torch.empty(outputs, groups, dtype=torch.uint8, device=device)
    step = max(1, _CHUNK // inputs)
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        part = F.pad(weight[rows].detach().float(), (0, -inputs % group))
        codes, scales[rows], zeros[rows] = _coded(part.unflatten(1, (-1, group)), bits)
        codes = codes.flatten(1)[:, :inputs]
        packed[rows] = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    if not scales.isfinite().all():
        raise not_finite(weight)
    return GroupWeight(packed, scales, zeros, bits, group, weight.dtype)


def _coded(
    values: Float32[Tensor, "rows g group"], bits: int
) -> tuple[UInt8[Tensor, "rows g group"], Float32[Tensor, "rows g"], UInt8[Tensor, "rows g"]]:
    levels = 2**bits - 1
    low = values.amin(-1).clamp(max=0)
    scales = (values.amax(-1).clamp(min=0) - low) / levels
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    zeros = torch.round(-low * inverse).clamp_(0, levels)
    codes = torch.round(values * inverse[..., None]).add_(zeros[..., None]).clamp_(0, levels)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def _unpacked(packed: UInt8[Tensor, "rows bytes"], bits: int) -> UInt8[Tensor, "rows in"]:
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)

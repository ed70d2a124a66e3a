"""LLM.int8: each output's weights are 8-bit integers, and so is each row that is multiplied.

Inputs in which some row is at least `threshold` in magnitude are multiplied apart, in the dtype of
the row: they are few, and would leave the other numbers of their row with no precision. Which
inputs these are depends on all rows that are read together, so that a row's result may change with
its neighbours by what 8 bits round.

Axes: N rows of x.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; files and order of the arithmetic are
those of bitsandbytes 0.50 (its float16 activations aside).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor

from ardor.errors import CheckpointError, ShapeError
from ardor.kernels import quantize as native
from ardor.quant.packed import DequantizedLinear, PackedWeight, Rows, not_finite

THRESHOLD = 6.0
LARGEST = 127


@dataclass(frozen=True, eq=False)
class RowsWeight(PackedWeight):
    """code * scale / 127 for each output: 8 bits per weight, and 32 per output."""

    codes: Int8[Tensor, "out in"]
    largest: Float32[Tensor, "out"]  # magnitude in each output (bitsandbytes' SCB)
    original_dtype: torch.dtype = torch.float16
    threshold: float = THRESHOLD  # 0: nothing is multiplied apart

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        scales = self.largest.mul(1 / LARGEST)[:, None]
        return torch.mul(self.codes, scales).to(dtype or self.original_dtype)

    def rows(self, rows: Rows) -> "RowsWeight":
        return RowsWeight(
            rows.of(self.codes), rows.of(self.largest), self.original_dtype, self.threshold
        )

    def product(
        self, x: Float[Tensor, "*rows in"], bias: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*rows out"]:
        """Its integers times those of x; the gradient is that of the dequantized weight."""
        return _RowsLinear.apply(x, self, bias)

    def tensors(self) -> dict[str, Tensor]:
        """What bitsandbytes writes of a module. Source: Linear8bitLt._save_to_state_dict."""
        order = torch.zeros((), dtype=torch.uint8, device=self.codes.device)  # row by row
        return {"weight": self.codes, "SCB": self.largest, "weight_format": order}

    def reread(self, found: Mapping[str, Tensor], name: str) -> "RowsWeight":
        return RowsWeight.from_tensors(found, name, self.original_dtype, self.threshold)

    @classmethod
    def from_tensors(
        cls,
        found: Mapping[str, Tensor],
        name: str = "",
        dtype: torch.dtype = torch.float16,
        threshold: float = THRESHOLD,
    ) -> "RowsWeight":
        """The inverse of `tensors`, also for files that bitsandbytes wrote; `name` is for errors.

        Raises: CheckpointError if a tensor is missing, of another order or another size.
        """
        if missing := sorted({"weight", "SCB"} - found.keys()):
            raise CheckpointError(
                f"{name} is not a complete LLM.int8 weight: found {sorted(found)}, "
                f"missing {missing}"
            )
        codes, largest = found["weight"], found["SCB"].float().reshape(-1)
        order = int(found.get("weight_format", torch.zeros(())))
        if codes.dtype != torch.int8 or codes.ndim != 2 or len(codes) != len(largest) or order:
            raise CheckpointError(
                f"{name}: found {codes.dtype} of shape {list(codes.shape)}, {len(largest)} scales "
                f"and weight_format {order}; expected int8 [out, in], one scale per output and 0 "
                "(by rows); quantize the original checkpoint again"
            )
        return cls(codes, largest, dtype, threshold)

    def error_bound(self) -> Float32[Tensor, "out"]:
        """The largest |weight - dequantized float32 weight| possible in each output.

        Half a step of its 127, and what rounding to float16 takes, first of all: one part in 2^11,
        or 2^-25 below its normal range. The last term covers the float32 rounding of scaling.
        """
        rounding = 4 * torch.finfo(torch.float32).eps * self.largest
        return self.largest * (0.5 / LARGEST + 2.0**-11) + 2.0**-25 + rounding


def quantize_rows(weight: Float[Tensor, "out in"]) -> RowsWeight:
    """The nearest of 255 steps of every weight, after rounding to float16 as bitsandbytes does.

    Raises: ShapeError unless it is a matrix, CheckpointError for NaN, or what float16 cannot hold.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(f"LLM.int8 holds matrices, found a weight of shape {tuple(weight.shape)}")
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    largest = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    if native.available(weight):
        native.int8_rows(weight.contiguous(), codes, largest)
    else:
        step = max(1, (1 << 20) // weight.shape[1])
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            codes[rows], largest[rows] = _by_row(weight[rows].half().float())
    if not largest.isfinite().all():
        raise not_finite(weight)
    return RowsWeight(codes, largest, weight.dtype)


class _RowsLinear(DequantizedLinear):
    """y = x W^T + b with both in 8 bits, outlying inputs apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*rows in"], weight: Any, bias: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*rows out"]:
        ctx.weight = weight
        flat = x.reshape(-1, x.shape[-1])
        outlying = flat.abs() >= weight.threshold if weight.threshold else None
        apart = None if outlying is None else outlying.any(0).nonzero()[:, 0]
        # Each row's scale leaves out its own outliers, but not what lies in the columns of others'.
        rest = flat if outlying is None else flat.masked_fill(outlying, 0)
        codes, largest = _by_row(rest.float())
        if apart is not None and len(apart):
            codes[:, apart] = 0
        scales = largest[:, None] * weight.largest * (1 / LARGEST**2)
        y = _integer_product(codes, weight.codes) * scales
        y = (y if bias is None else y + bias).to(x.dtype)
        if apart is not None and len(apart):
            columns = weight.codes[:, apart] * weight.largest.mul(1 / LARGEST)[:, None]
            y = torch.addmm(y, flat[:, apart], columns.to(x.dtype).T)
        return y.view(*x.shape[:-1], y.shape[-1])  # not -1: there may be no rows


def _by_row(values: Float32[Tensor, "N in"]) -> tuple[Tensor, Tensor]:
    """The nearest of each row's 255 steps, ties to even, and each row's largest magnitude."""
    largest = values.abs().amax(1)
    inverse = torch.where(largest > 0, LARGEST / largest, 0.0)
    return torch.round(values * inverse[:, None]).to(torch.int8), largest


def _integer_product(
    a: Int8[Tensor, "N in"], b: Int8[Tensor, "out in"]
) -> Int32[Tensor, "N out"] | Float32[Tensor, "N out"]:
    """a b^T; in integers where the hardware multiplies these, else in float32."""
    if a.device.type == "cpu" and _fast_integers():
        return torch._int_mm(a, b.T)
    # What CUDA's product of integers asks of its shapes.
    if a.device.type == "cuda" and len(a) > 16 and not (b.shape[0] % 8 or b.shape[1] % 8):
        return torch._int_mm(a, b.T)
    return F.linear(a.float(), b.float())


@cache
def _fast_integers() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"

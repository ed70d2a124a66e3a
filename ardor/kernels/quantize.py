"""Weights to 4 and 8 bits, and from 4 bits, compiled. Call them where `available(weight)`."""

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from ardor.kernels.native import NAMES, available, library, threads

__all__ = ["available", "four_bit", "from_four_bit", "int8_rows"]


def four_bit(
    flat: Float[Tensor, "n"],
    packed: UInt8[Tensor, "bytes"],
    absmax: Float32[Tensor, "blocks"],
    midpoints: Float32[Tensor, "15"],
    rising: UInt8[Tensor, "16"],
) -> None:
    """Write codes and largest magnitudes of whole blocks of 64; what lies after them is left."""
    blocks = flat.numel() // 64
    getattr(library(), f"quantize_4bit_{NAMES[flat.dtype]}")(
        *(tensor.data_ptr() for tensor in (flat, packed, absmax, midpoints, rising)),
        blocks,
        threads(flat.numel()),
    )


def from_four_bit(
    packed: UInt8[Tensor, "bytes"],
    scales: Float32[Tensor, "blocks"],
    levels: Float32[Tensor, "16"],
    out: Float[Tensor, "n"],
) -> None:
    """Write level * scale of whole blocks of 64, rounded once; what lies after them is left."""
    blocks = packed.numel() // 32
    getattr(library(), f"dequantize_4bit_{NAMES[out.dtype]}")(
        *(tensor.data_ptr() for tensor in (packed, scales, levels, out)),
        blocks,
        threads(out.numel()),
    )


def int8_rows(
    weight: Float[Tensor, "out in"], codes: Int8[Tensor, "out in"], largest: Float32[Tensor, "out"]
) -> None:
    """Write the codes of each row, and its largest magnitude after rounding to float16."""
    count = threads(weight.numel())
    scratch = torch.empty(count, weight.shape[1])
    getattr(library(), f"quantize_rows_{NAMES[weight.dtype]}")(
        *(tensor.data_ptr() for tensor in (weight, codes, largest, scratch)), *weight.shape, count
    )

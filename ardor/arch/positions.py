"""Rotary positions. Angles are float32; what is rotated keeps its dtype.

Axes: B batch, T positions, H heads, d head width, r rotated channels (r <= d, even).
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ardor.arch.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ProportionalScaling,
    Rope,
    Temperature,
    YarnScaling,
)
from ardor.kernels.rotate import rotate as kernel
from ardor.kernels.rotate import takes


class Rotation(NamedTuple):
    """What turns [B, H, T, d]: one angle for each pair of channels."""

    cos: Float[Tensor, "B 1 T half"]
    sin: Float[Tensor, "B 1 T half"]
    neighbours: bool = False


def frequencies(rope: Rope, lengths: Int[Tensor, "B T"]) -> Float[Tensor, "#B #T half"]:
    """Radians per position of each channel pair, after the scaling.

    `lengths` says of each position how long its text is by now, which some scalings depend on.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
    """
    device = lengths.device
    pairs = torch.arange(0, rope.rotated, 2, dtype=torch.float32, device=device) / rope.rotated
    plain = (1.0 / rope.theta**pairs)[None, None]
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case ProportionalScaling(turning=turning, factor=factor):
            still = torch.arange(rope.rotated // 2, device=device) >= turning
            return plain.masked_fill(still, 0.0) / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(plain, rope, scaling)
        case DynamicScaling() as scaling:
            return _dynamic(pairs, rope, scaling, lengths)
        case LongScaling() as scaling:
            divisors = (torch.tensor(t, device=device) for t in (scaling.short, scaling.long))
            short, long = (plain / divisor for divisor in divisors)
            return torch.where((lengths > scaling.original_positions)[..., None], long, short)


def _dynamic(
    pairs: Tensor, rope: Rope, scaling: DynamicScaling, lengths: Tensor
) -> Float[Tensor, "B T half"]:
    share = lengths[..., None].float() / scaling.original_positions
    growth = scaling.factor * share.clamp(min=1.0) - (scaling.factor - 1)
    theta = rope.theta * growth ** (rope.rotated / (rope.rotated - 2))
    return 1.0 / theta**pairs


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_positions * plain / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (turns - low) / (high - low)
    mixed = (1 - blend) * plain / scaling.factor + blend * plain
    return torch.where(turns < low, plain / scaling.factor, torch.where(turns > high, plain, mixed))


def _yarn(plain: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    def channel(turns: float) -> float:
        """Which (fractional) channel pair turns so often in the original context."""
        wavelength = scaling.original_positions / (turns * 2 * math.pi)
        return rope.rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotated - 1)
    width = (high - low) or 0.001  # equal borders make a step, not a division by zero
    index = torch.arange(rope.rotated // 2, dtype=torch.float32, device=plain.device)
    interpolated = ((index - low) / width).clamp(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def rotation(
    rope: Rope,
    positions: Int[Tensor, "B T"],
    dtype: torch.dtype,
    lengths: Int[Tensor, "B T"] | None = None,
) -> Rotation:
    """Cosines and sines of every position's angles, cast once to the dtype they will multiply.

    `lengths` as in `frequencies`; None: every text ends at its position.
    """
    lengths = positions + 1 if lengths is None else lengths
    angles = (positions[..., None].float() * frequencies(rope, lengths))[:, None]
    amplitude: Tensor | float = 1.0
    match rope.scaling:
        case YarnScaling(attention_factor=factor):
            amplitude = factor
        case LongScaling(short_amplitude=short, long_amplitude=long) as scaling:
            passed = (lengths > scaling.original_positions)[:, None, :, None]
            amplitude = torch.where(passed, long, short)
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return Rotation(cos.to(dtype), sin.to(dtype), rope.pairing == "neighbours")


def growth(temperature: Temperature, positions: Int[Tensor, "B T"]) -> Float[Tensor, "B 1 T 1"]:
    """What multiplies the queries at each position."""
    passed = ((positions + temperature.first) // temperature.span).float()
    return (1.0 + temperature.slope * (1.0 + passed).log())[:, None, :, None]


def rotate(x: Float[Tensor, "B H T d"], by: Rotation) -> Float[Tensor, "B H T d"]:
    """Turn the channel pairs of the first r channels; the rest pass through.

    Pairs are (i, i + r/2), as in GPT-NeoX and Llama, or neighbours (2i, 2i + 1), as in GPT-J.
    """
    if by.neighbours:
        return _turned_neighbours(x, by.cos, by.sin)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, by.cos, by.sin)
    return _turned(x, by.cos, by.sin)


def _turned_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    first, second = turning[..., ::2], turning[..., 1::2]
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


class _Rotate(torch.autograd.Function):
    """Nothing of x's size kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(upstream[0], cos, sin, back=True), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference, and what a compiler fuses by itself."""
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """`turned`, or its way back, with fewer passes over x: one where there is a kernel."""
    if takes(x, cos):
        return kernel(x, cos, sin, back=back)
    sin = -sin if back else sin
    if torch.compiler.is_compiling():
        return turned(x, cos, sin)
    half = cos.shape[-1]
    out = torch.empty_like(x)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out

"""NF4 and FP4: sixteen levels, scaled by the largest value of every 64 weights.

NF4's levels are quantiles of a normal distribution, FP4's the numbers of a four-bit float. Codes,
scales and packing are the bytes that bitsandbytes writes on a CPU, so checkpoints can be exchanged
in both directions. Double quantization stores the scales themselves in 8 bits.

Axes: n weights (flattened, row-major), nb = ceil(n / 64) blocks.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; the constants and the order of the
arithmetic are those of bitsandbytes 0.50.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, Num, UInt8
from torch import Tensor

from ardor.errors import CheckpointError, ShapeError
from ardor.kernels import quantize as native
from ardor.quant.packed import PackedWeight, Rows, not_finite, workspace

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own
# A sign, two bits of exponent and one of mantissa, over the largest.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, 0.0, *(-level for level in _FP4[1:])),
}
# The codes by rising level, as bitsandbytes breaks the tie of FP4's two zeros.
_RISING = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
# Half of the widest gap between levels: no scaled weight is further from its own.
HALF_GAP = {"nf4": (LEVELS["nf4"][1] - LEVELS["nf4"][0]) / 2, "fp4": (1 - 8 / 12) / 2}
# Half the widest gap of the 8-bit map, 0.9/64, and half a bin of the table that finds the code.
NESTED_HALF_GAP = 0.9 / 128 + 1 / 65535

STATE = "weight.quant_state.bitsandbytes__"  # and the kind: JSON in a tensor of bytes
_TINY = 1e-38  # divides a block of zeros
# A chunk stays in a CPU's cache; an accelerator wants few launches, but also bounded memory.
_CHUNK, _CHUNK_ACCELERATOR = 1 << 18, 1 << 24


class Nested(NamedTuple):
    """What turns 8-bit scale codes back into scales: map[code] * absmax[block] + offset."""

    absmax: Float32[Tensor, "nested_blocks"]  # one per 256 scales
    offset: Float32[Tensor, ""]  # the mean of the scales


@dataclass(frozen=True, eq=False)
class FourBitWeight(PackedWeight):
    """A quantized tensor: 4.5 bits per weight, or 4.127 with nested scales.

    Element 2j of the flattened tensor is the high half of byte j, element 2j + 1 the low half.
    """

    packed: UInt8[Tensor, "bytes 1"]  # ceil(n / 2) bytes
    absmax: Num[Tensor, "blocks"]  # float32, or 8-bit codes when nested
    nested_absmax: Float32[Tensor, "nested_blocks"] | None
    nested_offset: Float32[Tensor, ""] | None
    shape: tuple[int, ...]
    original_dtype: torch.dtype  # of the tensor that was quantized
    kind: str = "nf4"

    @property
    def nested(self) -> Nested | None:
        if self.nested_absmax is None or self.nested_offset is None:
            return None
        return Nested(self.nested_absmax, self.nested_offset)

    def scales(self) -> Float32[Tensor, "blocks"]:
        """The largest magnitude of each block of 64, exact unless nested."""
        if self.nested is None:
            return self.absmax
        nested_map, _ = _nested_tables(self.absmax.device)
        wide = self.nested.absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return nested_map[self.absmax.int()] * wide + self.nested.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        """level * scale, multiplied in float32 and rounded once to `dtype` (None: the original's).

        Each element is within `error_bound` of its block, and the rounding to `dtype`, of the
        weight that was quantized.
        """
        return self._written(torch.empty, dtype or self.original_dtype)

    def expanded(self, dtype: torch.dtype) -> Float[Tensor, "..."]:
        return self._written(workspace, dtype)

    def _written(self, room: Callable[..., Tensor], dtype: torch.dtype) -> Float[Tensor, "..."]:
        tables = _tables(self.kind, self.packed.device)
        scales = self.scales()
        # Whole blocks are written, and the surplus of the last one is cut off by a view.
        out = room(len(scales) * BLOCK, dtype=dtype, device=self.packed.device).view(-1, BLOCK)
        packed = self.packed.view(-1)
        done = 0
        if native.available(out):
            native.from_four_bit(packed, scales.contiguous(), tables.levels, out.view(-1))
            done = packed.numel() // (BLOCK // 2) * BLOCK
        for first, last in _chunks(len(scales) * BLOCK, self.packed.device, done):
            codes = packed[first // 2 : last // 2]
            values = torch.take(tables.pairs, codes.long()).view(torch.float32)
            if missing := last - first - len(values):
                values = F.pad(values, (0, missing))
            rows = slice(first // BLOCK, last // BLOCK)
            torch.mul(values.view(-1, BLOCK), scales[rows, None], out=out[rows])
        n = torch.Size(self.shape).numel()
        return out.view(-1)[:n].view(self.shape)

    def rows(self, rows: Rows) -> PackedWeight:
        outputs, inputs = self.shape
        if inputs % BLOCK:
            return super().rows(rows)
        packed = rows.of(self.packed.view(outputs, -1))
        scales = rows.of(self.scales().view(outputs, -1))
        shape = (len(packed), inputs)
        return FourBitWeight(
            packed.reshape(-1, 1),
            scales.reshape(-1),
            None,
            None,
            shape,
            self.original_dtype,
            self.kind,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What bitsandbytes writes of a module.

        Source: bitsandbytes 0.50, QuantState.as_dict(packed=True).
        """
        device = self.packed.device
        about: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": BLOCK,
            "dtype": str(self.original_dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        found = {
            "weight": self.packed,
            "weight.absmax": self.absmax,
            "weight.quant_map": torch.tensor(LEVELS[self.kind], dtype=torch.float32, device=device),
        }
        if self.nested is not None:
            about |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            about["nested_offset"] = self.nested.offset.item()
            found["weight.nested_absmax"] = self.nested.absmax
            found["weight.nested_quant_map"] = dynamic_map().to(device)
        text = json.dumps(about).encode()
        state = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        return found | {STATE + self.kind: state}

    def reread(self, found: Mapping[str, Tensor], name: str) -> "FourBitWeight":
        return FourBitWeight.from_tensors(found, name)

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor], name: str = "") -> "FourBitWeight":
        """The inverse of `tensors`, also for files that bitsandbytes wrote; `name` is for errors.

        Raises: CheckpointError if a tensor is missing, is of another block, or has another size.
        """
        kind = next((kind for kind in LEVELS if STATE + kind in found), "nf4")
        needed = {"weight", "weight.absmax", "weight.quant_map", STATE + kind}
        about = {} if needed - found.keys() else json.loads(bytes(found[STATE + kind].tolist()))
        if "nested_offset" in about:
            needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
        if missing := sorted(needed - found.keys()):
            raise CheckpointError(
                f"{name} is not a complete {kind.upper()} weight: found {sorted(found)}, "
                f"missing {missing}"
            )
        nested_absmax = nested_offset = None
        if "nested_offset" in about:
            offset = torch.tensor(about["nested_offset"], dtype=torch.float32)
            nested_offset = offset.to(found["weight"].device)
            nested_absmax = found["weight.nested_absmax"]
            _expect(name, "nested block", about["nested_blocksize"], NESTED_BLOCK)
            theirs = found["weight.nested_quant_map"].cpu()
            close = torch.allclose(theirs, dynamic_map(), atol=1e-6)
            _expect(name, "use of bitsandbytes' dynamic map", close, True)
        levels = torch.tensor(LEVELS[kind], dtype=torch.float32)
        same = torch.allclose(found["weight.quant_map"].cpu(), levels)
        _expect(name, "block", about["blocksize"], BLOCK)
        _expect(name, f"use of the {kind.upper()} levels", same, True)
        shape = tuple(about["shape"])
        n = torch.Size(shape).numel()
        # Other storage dtypes are mere views.
        packed = found["weight"].view(torch.uint8).reshape(-1, 1)
        absmax = found["weight.absmax"]
        _expect(name, f"bytes for shape {shape}", packed.numel(), (n + 1) // 2)
        _expect(name, f"scales for shape {shape}", absmax.numel(), -(-n // BLOCK))
        dtype = getattr(torch, about["dtype"])
        return cls(packed, absmax, nested_absmax, nested_offset, shape, dtype, kind)

    def error_bound(self) -> Float32[Tensor, "blocks"]:
        """The largest |weight - dequantized float32 weight| possible in each block.

        Half the widest gap between levels (NF4 0.1519, FP4 0.1667) times the block's scale; nested
        scales may themselves be off by 0.00705 of the largest deviation from their mean. The last
        term covers the float32 rounding of scaling and of unscaling.
        """
        scales = self.scales()
        drift = torch.zeros_like(scales)
        if self.nested is not None:
            wide = self.nested.absmax.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
            drift = NESTED_HALF_GAP * wide
        largest = scales.abs() + drift
        rounding = 4 * torch.finfo(torch.float32).eps * largest
        return HALF_GAP[self.kind] * largest + drift + rounding


def quantize_4bit(
    weight: Float[Tensor, "..."], kind: str = "nf4", double: bool = False
) -> FourBitWeight:
    """The nearest level of every weight over its block's largest magnitude.

    A tie takes the lower level. `double` also quantizes the scales, less their mean, to bnb's
    8-bit dynamic map in blocks of 256. All-zero blocks are exact. On a CPU temporary memory is a
    few MiB, and half a byte per weight more if `double`.

    Raises: ShapeError for an empty tensor, CheckpointError for one with NaN or infinity in it.
    """
    n = weight.numel()
    if not n:
        raise ShapeError(f"a weight of shape {tuple(weight.shape)} has nothing to quantize")
    flat = weight.detach().reshape(-1)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=weight.device)
    tables = _tables(kind, weight.device)
    done = 0
    if native.available(flat):
        done = n // BLOCK * BLOCK
        native.four_bit(flat[:done], packed, absmax, tables.midpoints, tables.rising)
    for first, last in _chunks(n, weight.device, done):
        scaled, scales = _scale(flat[first:last].float(), BLOCK)
        absmax[first // BLOCK : first // BLOCK + len(scales)] = scales
        packed[first // 2 : (last + 1) // 2] = _pack(scaled, tables)
    if not absmax.isfinite().all():
        raise not_finite(weight)
    shape = tuple(weight.shape)
    if not double:
        return FourBitWeight(packed[:, None], absmax, None, None, shape, weight.dtype, kind)
    codes, nested = _nest(absmax)
    return FourBitWeight(packed[:, None], codes, *nested, shape, weight.dtype, kind)


def _expect(name: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name}: {what} is {found}, but Ardor reads {expected}; "
            "quantize the original checkpoint again"
        )


def _chunks(n: int, device: torch.device, done: int = 0) -> Iterator[tuple[int, int]]:
    """[first, last) ranges that cover n elements but the first `done`; each begins a block."""
    step = _CHUNK if device.type == "cpu" else _CHUNK_ACCELERATOR
    return ((first, min(first + step, n)) for first in range(done, n, step))


def _scale(values: Float32[Tensor, "n"], block: int) -> tuple[Tensor, Tensor]:
    """Every value over the largest magnitude of its block, and those magnitudes.

    Whole blocks multiply by the reciprocal and a partial one divides: bitsandbytes does, and a
    weight near a midpoint can tell the difference.
    """
    whole = values.numel() // block * block
    rows = values[:whole].view(-1, block)
    absmax = rows.abs().amax(1)
    scaled = (rows * (1.0 / absmax.clamp(min=_TINY))[:, None]).view(-1)
    if whole < values.numel():
        rest = values[whole:]
        largest = rest.abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, rest / largest])
    return scaled, absmax


class Tables(NamedTuple):
    """Of one kind, on one device."""

    midpoints: Float32[Tensor, "15"]  # between neighbouring levels
    rising: UInt8[Tensor, "16"]  # the codes, by level
    pairs: Int64[Tensor, "256"]  # the two float32 levels of every byte
    levels: Float32[Tensor, "16"]  # by code


def _pack(scaled: Float32[Tensor, "n"], tables: Tables) -> UInt8[Tensor, "bytes"]:
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    places = torch.bucketize(scaled, tables.midpoints, out_int32=True)
    codes = tables.rising[places].view(-1, 2)
    return torch.add(codes[:, 1], codes[:, 0], alpha=16)


def _nest(absmax: Float32[Tensor, "blocks"]) -> tuple[UInt8[Tensor, "blocks"], Nested]:
    offset = absmax.mean()
    deviation = absmax - offset
    padded = F.pad(deviation, (0, -len(deviation) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_absmax = padded.abs().amax(1)
    some = nested_absmax > 0
    inverse = torch.where(some, 1.0 / nested_absmax, 0.0)
    halves = ((padded * inverse[:, None]).clamp(-1, 1) + 1.0) * 0.5
    # Float64 rounds halves * 65535 + 0.5 once, as the fused multiply-add of bitsandbytes does.
    bins = (halves.double() * 65535 + 0.5).float().int()
    _, table = _nested_tables(absmax.device)
    # In a block without deviations every code decodes to zero; bitsandbytes writes code 0.
    codes = torch.where(some[:, None], table[bins], 0).to(torch.uint8)
    return codes.view(-1)[: len(deviation)].clone(), Nested(nested_absmax, offset)


@cache
def _tables(kind: str, device: torch.device) -> Tables:
    with torch.inference_mode(False):  # cached tensors must also serve under autograd
        levels = torch.tensor(LEVELS[kind], dtype=torch.float32, device="cpu")
        rising = torch.tensor(_RISING[kind], dtype=torch.uint8, device="cpu")
        ordered = levels[rising.int()]
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        midpoints = (ordered[:-1] + ordered[1:]) / 2
        found = (midpoints, rising, pairs.view(torch.int64).view(-1), levels)
        return Tables(*(table.to(device) for table in found))


@cache
def _nested_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 8-bit dynamic map, and the code of each of 65,536 evenly spaced values in [-1, 1].

    bitsandbytes finds codes with this table on a CPU: half a bin, 1/65535, from the nearest.
    """
    with torch.inference_mode(False):
        nested_map = dynamic_map()
        midpoints = 0.5 * (nested_map[:-1] + nested_map[1:])
        grid = 2.0 * torch.arange(65536, dtype=torch.float32, device="cpu") / 65535 - 1.0
        codes = torch.bucketize(grid, midpoints).to(torch.uint8)
        return nested_map.to(device), codes.to(device)


def dynamic_map() -> Float32[Tensor, "256"]:
    """The signed 8-bit dynamic map: seven decades, each with twice the fractions of the one below.

    Source: Dettmers 2015, arXiv:1511.04561, section 2.1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        # The order of the product, power first, is what makes the last bit agree.
        values += [
            *(10 ** (decade - 6) * means).tolist(),
            *(-(10 ** (decade - 6)) * means).tolist(),
        ]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")

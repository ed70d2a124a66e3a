"""GPTQ and AWQ checkpoints: integers packed eight (or four, or sixteen) to a 32-bit word.

Both keep a weight as [in, out] with a scale and a zero for every group of inputs and each output.
GPTQ packs along the inputs, and may give each input a group of its own choosing; AWQ packs along
the outputs, in the order that its kernels unpack.

Axes: g groups, w numbers in a word.
Source: Frantar et al. 2022, arXiv:2210.17323, and Lin et al. 2023, arXiv:2306.00978; the layouts
are those of AutoGPTQ 0.7 and AutoAWQ 0.2 (version "gemm").
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int32
from torch import Tensor

from ardor.errors import CheckpointError
from ardor.quant.packed import PackedWeight

WORD = 32  # bits
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of the outputs in their order
_CHUNK = 1 << 20  # numbers at a time


@dataclass(frozen=True, eq=False)
class GPTQWeight(PackedWeight):
    """(code - zero) * scale. The first version stores each zero less one."""

    qweight: Int32[Tensor, "words out"]
    qzeros: Int32[Tensor, "g zero_words"]
    scales: Float[Tensor, "g out"]
    g_idx: Int32[Tensor, "in"] | None  # the group of each input; None: in their order
    bits: int
    group: int
    less_one: bool

    original_dtype = torch.float16

    @property
    def shape(self) -> tuple[int, ...]:
        words, outputs = self.qweight.shape
        return (outputs, words * WORD // self.bits)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """A view of a new [in, out] tensor."""
        outputs, inputs = self.shape
        per_word = WORD // self.bits
        zeros = _unpacked(self.qzeros, self.bits, 1, tuple(range(per_word)))
        if self.less_one:
            zeros = zeros.add_(1).bitwise_and_(2**self.bits - 1)
        groups = self.g_idx
        if groups is None:
            groups = torch.arange(inputs, device=self.qweight.device) // self.group
        out = torch.empty(inputs, outputs, dtype=dtype or torch.float16, device=zeros.device)
        step = max(1, _CHUNK // outputs // per_word)
        for first in range(0, len(self.qweight), step):
            words = self.qweight[first : first + step]
            codes = _unpacked(words, self.bits, 0, tuple(range(per_word)))
            rows = slice(first * per_word, first * per_word + len(codes))
            chosen = groups[rows]
            out[rows] = codes.sub_(zeros[chosen]).float().mul_(self.scales[chosen].float())
        return out.T

    def tensors(self) -> dict[str, Tensor]:
        found = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}
        return found if self.g_idx is None else found | {"g_idx": self.g_idx}

    def reread(self, found: Mapping[str, Tensor], name: str) -> "GPTQWeight":
        return GPTQWeight.from_tensors(found, name, self.bits, self.group, self.less_one)

    @classmethod
    def from_tensors(
        cls, found: Mapping[str, Tensor], name: str, bits: int, group: int, less_one: bool
    ) -> "GPTQWeight":
        """What files hold of a module; `group` -1 is all inputs. `name` is for errors.

        Raises: CheckpointError if a tensor is missing, or of another dtype or size.
        """
        qweight, qzeros, scales = _three(found, name)
        inputs, outputs = len(qweight) * WORD // bits, qweight.shape[1]
        group = inputs if group == -1 else group
        _expect_grid(name, qzeros, scales, -(-inputs // group), outputs, bits)
        g_idx = found.get("g_idx")
        if g_idx is not None and (
            g_idx.shape != (inputs,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= len(scales)
        ):
            raise CheckpointError(
                f"{name}: g_idx of shape {list(g_idx.shape)} does not give each of {inputs} inputs "
                f"one of {len(scales)} groups; download it again"
            )
        return cls(qweight, qzeros, scales, g_idx, bits, group, less_one)


@dataclass(frozen=True, eq=False)
class AWQWeight(PackedWeight):
    """(code - zero) * scale, with 4-bit codes."""

    qweight: Int32[Tensor, "in words"]
    qzeros: Int32[Tensor, "g zero_words"]
    scales: Float16[Tensor, "g out"]
    group: int

    original_dtype = torch.float16

    @property
    def shape(self) -> tuple[int, ...]:
        inputs, words = self.qweight.shape
        return (words * WORD // 4, inputs)

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """A view of a new [in, out] tensor."""
        outputs, inputs = self.shape
        zeros = _unpacked(self.qzeros, 4, 1, _AWQ_PLACES)
        out = torch.empty(inputs, outputs, dtype=dtype or torch.float16, device=zeros.device)
        for index in range(len(zeros)):
            rows = slice(index * self.group, (index + 1) * self.group)
            codes = _unpacked(self.qweight[rows], 4, 1, _AWQ_PLACES)
            out[rows] = codes.sub_(zeros[index]).float().mul_(self.scales[index].float())
        return out.T

    def tensors(self) -> dict[str, Tensor]:
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}

    def reread(self, found: Mapping[str, Tensor], name: str) -> "AWQWeight":
        return AWQWeight.from_tensors(found, name, self.group)

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor], name: str, group: int) -> "AWQWeight":
        """What files hold of a module; `group` -1 is all inputs. `name` is for errors.

        Raises: CheckpointError if a tensor is missing, or of another dtype or size.
        """
        qweight, qzeros, scales = _three(found, name)
        inputs, outputs = len(qweight), qweight.shape[1] * WORD // 4
        group = inputs if group == -1 else group
        _expect_grid(name, qzeros, scales, -(-inputs // group), outputs, 4)
        return cls(qweight, qzeros, scales, group)


def _unpacked(
    words: Int32[Tensor, "a b"], bits: int, axis: int, places: tuple[int, ...]
) -> Int32[Tensor, "c d"]:
    """The numbers in words along an axis, each word's in the order of their `places`."""
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device) * bits
    shape = (-1, 1) if axis == 0 else (-1,)
    spread = words.unsqueeze(axis + 1) >> shifts.view(shape)
    return spread.bitwise_and_(2**bits - 1).flatten(axis, axis + 1)


def _three(found: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    needed = ("qweight", "qzeros", "scales")
    if missing := [key for key in needed if key not in found]:
        raise CheckpointError(
            f"{name} is not a complete quantized weight: found {sorted(found)}, missing {missing}; "
            "download it again"
        )
    qweight, qzeros, scales = (found[key] for key in needed)
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or qweight.ndim != 2:
        raise CheckpointError(
            f"{name}: qweight is {qweight.dtype} of shape {list(qweight.shape)} and qzeros "
            f"{qzeros.dtype}; words of 32 bits (torch.int32) are read"
        )
    return qweight, qzeros, scales


def _expect_grid(
    name: str, qzeros: Tensor, scales: Tensor, groups: int, outputs: int, bits: int
) -> None:
    wanted = [[groups, outputs], [groups, outputs * bits // WORD]]
    if [list(scales.shape), list(qzeros.shape)] != wanted:
        raise CheckpointError(
            f"{name}: scales are {list(scales.shape)} and qzeros {list(qzeros.shape)}, but bits "
            f"and group_size of config.json make them {wanted[0]} and {wanted[1]}; take both files "
            "from the same place"
        )

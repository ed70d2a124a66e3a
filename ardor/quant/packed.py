"""What weights of every packed format have in common: numbers, files, parts and products."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ardor.errors import CheckpointError


class Rows(NamedTuple):
    """Some outputs of a map: `count` in a row from `first` on, in each of `groups` equal groups."""

    first: int
    count: int
    groups: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """Those rows of a tensor; a view where there is one group."""
        grouped = tensor.unflatten(0, (self.groups, -1))
        return grouped.narrow(1, self.first, self.count).flatten(0, 1)


class PackedWeight:
    """A quantized weight. Frozen dataclasses derive from it; their tensors are their storage."""

    if TYPE_CHECKING:  # at run time a field of a dataclass would take these for its default

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def original_dtype(self) -> torch.dtype: ...  # of the tensor that was quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        """Its numbers as a new tensor, rounded once to `dtype` (None: the original's)."""
        raise NotImplementedError

    def expanded(self, dtype: torch.dtype) -> Float[Tensor, "..."]:
        """Its numbers for one product, perhaps in memory that the next one is written over."""
        return self.dequantize(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What its files hold, by name within the module ("weight", "weight.absmax")."""
        raise NotImplementedError

    def reread(self, found: Mapping[str, Tensor], name: str) -> "PackedWeight":
        """Another weight of the same format and settings from what files hold of it.

        Raises: CheckpointError if that is not complete, or does not fit together.
        """
        raise NotImplementedError

    def rows(self, rows: Rows) -> "PackedWeight":
        """Some of its outputs. Formats that can share memory with the whole do."""
        return _RowsOf(self, rows)

    def product(
        self, x: Float[Tensor, "*rows in"], bias: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*rows out"]:
        """x W~^T + b in the dtype of x, with the gradient in x."""
        return DequantizedLinear.apply(x, self, bias)

    @property
    def parts(self) -> dict[str, Any]:
        """What it was made of, by name: tensors that are its storage, and facts."""
        # Of any frozen dataclass that derives from this class.
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}

    @property
    def storage(self) -> dict[str, Tensor]:
        """Every tensor it is kept in, by name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Tensor)}

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.storage.values())


@dataclass(frozen=True, eq=False)
class _RowsOf(PackedWeight):
    """Some outputs of a weight whose storage cannot be cut: the whole is expanded for them."""

    whole: PackedWeight
    chosen: Rows

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        return self.chosen.of(self.whole.dequantize(dtype))


class _Workspace(threading.local):
    """Where a thread expands one weight after the other on a CPU.

    Expanded anew for each product, large weights would find their room split by what is kept beside
    them, and the heap of a training run would grow by half.
    """

    def __init__(self):
        self.room = torch.empty(0, dtype=torch.uint8)

    def of(self, count: int, dtype: torch.dtype) -> Tensor:
        needed = count * dtype.itemsize
        if self.room.numel() < needed:
            self.room = torch.empty(0, dtype=torch.uint8)  # let go of before there is another
            self.room = torch.empty(needed, dtype=torch.uint8)
        return self.room[:needed].view(dtype)


_workspace = _Workspace()


def workspace(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for so many numbers, which this thread's next call gives away again, if on a CPU."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(count, dtype=dtype, device=device)
    return _workspace.of(count, dtype)


@runtime_checkable
class Quantized(Protocol):
    """A weight of some format, which can say what its numbers are."""

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


class DequantizedLinear(torch.autograd.Function):
    """F.linear that remembers the quantized weight in place of the dense one; frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*rows in"],
        weight: Quantized,
        bias: Float[Tensor, "out"] | None,
    ) -> Float[Tensor, "*rows out"]:
        ctx.weight = weight
        return F.linear(x, _expanded(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    # The decorator's type forgets the name of `ctx`.
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (upstream,) = grad_outputs  # (*rows, out)
        return upstream @ _expanded(ctx.weight, upstream.dtype), None, None


def _expanded(weight: Quantized, dtype: torch.dtype) -> Tensor:
    return weight.expanded(dtype) if isinstance(weight, PackedWeight) else weight.dequantize(dtype)


def not_finite(weight: Tensor) -> CheckpointError:
    """The error for a weight that no scale can hold."""
    return CheckpointError(
        f"a weight of shape {tuple(weight.shape)} holds NaN or infinity and cannot be "
        "quantized; load it in float32 or bfloat16 and look for a damaged or overflowed tensor"
    )

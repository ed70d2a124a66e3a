"""Linear maps whose weight is stored quantized and expanded for the moment of each product."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ardor.arch.linear import Linear, place_of
from ardor.errors import CheckpointError, ConfigError, ShapeError
from ardor.quant.nf4 import Nested, NF4Weight, quantize_nf4

FORMATS: dict[str, Callable[[Tensor], NF4Weight]] = {
    "nf4": quantize_nf4,
    "nf4-dq": lambda weight: quantize_nf4(weight, double=True),
}
DEFAULT_SKIP = ("lm_head",)  # the head decides every token: it stays as it is


class KeepsDtypes(nn.Module):
    """A module whose buffers keep their dtypes: they are parts of a storage format.

    `.to(torch.bfloat16)` would round scales, and take packed numbers for what they say.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsDtypes":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class StoredLinear(KeepsDtypes):
    """A linear map that is kept in the packed format of its file."""

    bias: nn.Parameter | None

    def dequantized(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """Its weight as a new tensor, rounded once to `dtype` (None: what the format is for)."""
        raise NotImplementedError


class QuantizedLinear(KeepsDtypes):
    """y = x W~^T + b in the dtype of x, where W~ is the dequantized weight. Frozen.

    Neither the forward nor the backward pass keeps W~: the backward pass expands it again. The
    state dict has bitsandbytes' names and bytes, and `load_state_dict` reads theirs.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: NF4Weight, bias: Float[Tensor, "out"] | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"a linear weight is [out, in], found shape {weight.shape}")
        self.outputs, self.inputs = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._hold(weight)

    @classmethod
    def from_weight(
        cls, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, format: str
    ) -> "QuantizedLinear":
        """Quantize one weight, as it comes from a file, on the device it is on.

        Raises: ConfigError if `format` is unknown.
        """
        return cls(_quantizer(format)(weight), bias)

    @property
    def quantized(self) -> NF4Weight:
        """The weight as a value that shares this module's memory."""
        nested = None
        if self.nested_absmax is not None and self.nested_offset is not None:
            nested = Nested(self.nested_absmax, self.nested_offset)
        return NF4Weight(
            self.packed, self.absmax, nested, (self.outputs, self.inputs), self.original_dtype
        )

    @property
    def bytes(self) -> int:
        """Bytes held by the weight (see NF4Weight.bytes) and the bias."""
        return self.quantized.bytes + (0 if self.bias is None else self.bias.nbytes)

    def dequantized(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """W~ as a new tensor, rounded once to `dtype` (None: what was quantized)."""
        return self.quantized.dequantize(dtype)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return DequantizedLinear.apply(x, self.quantized, bias)

    def extra_repr(self) -> str:
        format = "nf4" if self.nested_absmax is None else "nf4-dq"
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}, {format}"

    def _hold(self, weight: NF4Weight) -> None:
        self.original_dtype = weight.dtype
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        absmax, offset = weight.nested or (None, None)
        self.register_buffer("nested_absmax", absmax)
        self.register_buffer("nested_offset", offset)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for suffix, tensor in self.quantized.tensors().items():
            destination[f"{prefix}weight{suffix}"] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        found = {key.removeprefix(name): state_dict[key] for key in state_dict if _of(key, name)}
        if not found:
            missing_keys.append(name)
        else:
            try:
                weight = NF4Weight.from_tensors(found, name)
            except CheckpointError as error:
                error_msgs.append(str(error))
            else:
                self._take(weight, name, error_msgs)
        known = {name + suffix for suffix in self.quantized.tensors()}
        if self.bias is not None:
            known.add(f"{prefix}bias")
            if f"{prefix}bias" in state_dict:
                with torch.no_grad():
                    self.bias.copy_(state_dict[f"{prefix}bias"])
            else:
                missing_keys.append(f"{prefix}bias")
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    def _take(self, weight: NF4Weight, name: str, error_msgs: list[str]) -> None:
        if weight.shape != (self.outputs, self.inputs):
            error_msgs.append(
                f"{name} has shape {weight.shape}, expected {(self.outputs, self.inputs)}"
            )
            return
        device = self.packed.device
        self._hold(weight)
        for key, tensor in self._buffers.items():
            self._buffers[key] = None if tensor is None else tensor.to(device, copy=True)


def quantize_decoder(
    decoder: nn.Module, format: str = "nf4", skip: Iterable[str] = DEFAULT_SKIP
) -> list[str]:
    """Replace the linears inside the layers of `decoder` by quantized ones; their names.

    One that its file keeps in another format is expanded first. One weight is replaced at a time,
    so the extra memory is that of one. Embeddings, norms and the head are never touched. `skip`
    adds to the default and never replaces it; an entry covers the modules whose dotted name
    contains it as whole parts ("o_proj", "mixer", "layers.0").

    Raises: ConfigError for an unknown format, or an entry of `skip` that covers no module.
    """
    quantizer = _quantizer(format)
    names = [name for name, _ in decoder.named_modules() if name]
    skipped = (*DEFAULT_SKIP, *skip)
    _check_skip(skipped, names)
    replaced = []
    for name in names:
        linear = decoder.get_submodule(name)
        # Exactly torch's: a class derived from it may do more than multiply.
        dense = isinstance(linear, Linear | StoredLinear) or type(linear) is nn.Linear
        if not dense or place_of(decoder, name) != "layers":
            continue
        assert isinstance(linear, Linear | StoredLinear | nn.Linear)
        if any(_covers(entry, name) for entry in skipped):
            continue
        weight = linear.dequantized() if isinstance(linear, StoredLinear) else linear.weight
        decoder.set_submodule(name, QuantizedLinear(quantizer(weight), linear.bias))
        replaced.append(name)
    return replaced


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
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    # The decorator's type forgets the name of `ctx`.
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (upstream,) = grad_outputs  # (*rows, out)
        return upstream @ ctx.weight.dequantize(upstream.dtype), None, None


def _quantizer(format: str) -> Callable[[Tensor], NF4Weight]:
    if format not in FORMATS:
        raise ConfigError(
            f"quantization={format!r} is not known; choose one of {', '.join(FORMATS)}"
        )
    return FORMATS[format]


def _check_skip(skip: tuple[str, ...], names: list[str]) -> None:
    parts = sorted({part for name in names for part in name.split(".")} | set(names))
    for entry in skip:
        if entry in DEFAULT_SKIP or any(_covers(entry, name) for name in names):
            continue
        near = difflib.get_close_matches(entry, parts, n=3) or parts[:3]
        raise ConfigError(f"skip entry {entry!r} matches no module; did you mean {near}?")


def _covers(entry: str, name: str) -> bool:
    return f".{entry}." in f".{name}."


def _of(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")

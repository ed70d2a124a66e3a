"""Linear maps whose weight is stored quantized and expanded for the moment of each product."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch.linear import Linear, place_of
from ardor.errors import CheckpointError, ConfigError, ShapeError
from ardor.quant.formats import FORMATS, format_name
from ardor.quant.packed import DequantizedLinear, PackedWeight, Quantized, Rows

__all__ = ["DequantizedLinear", "Quantized", "QuantizedLinear", "covers", "quantize_decoder"]

# The head decides every token, a gate what is read at all: they stay as they are.
DEFAULT_SKIP = ("lm_head", "shared_gate")


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
    state dict has the names and bytes of the format's files, and `load_state_dict` reads these.
    Where a checkpoint joins several maps in one weight, each has the whole of it and computes
    `part`; their storage is shared.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Float[Tensor, "out"] | None = None,
        part: Rows | None = None,
    ):
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"a linear weight is [out, in], found shape {weight.shape}")
        self.outputs, self.inputs = weight.shape
        self.part = part
        if part is not None:
            self.outputs = part.count * part.groups
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self._hold(weight)

    @classmethod
    def from_weight(
        cls, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, format: str
    ) -> "QuantizedLinear":
        """Quantize one weight, as it comes from a file, on the device it is on.

        Raises: ConfigError if `format` is unknown.
        """
        return cls(FORMATS[format_name(format)](weight), bias)

    @property
    def quantized(self) -> PackedWeight:
        """The weight as a value that shares this module's memory: with all its parts, if joined."""
        storage = {name: held for name, held in self._buffers.items() if held is not None}
        return self._kind(**self._facts, **storage)

    @property
    def original_dtype(self) -> torch.dtype:
        """Of what was quantized."""
        return self.quantized.original_dtype

    @property
    def bytes(self) -> int:
        """Bytes held by the weight (its share of a joined one) and the bias."""
        whole = self.quantized
        share = whole.bytes * self.outputs // whole.shape[0]
        return share + (0 if self.bias is None else self.bias.nbytes)

    def dequantized(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """W~ as a new tensor, rounded once to `dtype` (None: what was quantized)."""
        return self._own().dequantize(dtype)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._own().product(x, bias)

    def back(self, slope: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows in"]:
        """The slope in x, new, from that in y."""
        return slope @ self._own().expanded(slope.dtype)

    def extra_repr(self) -> str:
        kind = self._kind.__name__
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}, {kind}"

    def _own(self) -> PackedWeight:
        whole = self.quantized
        return whole if self.part is None else whole.rows(self.part)

    def _hold(self, weight: PackedWeight) -> None:
        for name, tensor in weight.storage.items():
            self.register_buffer(name, tensor)
        self._kind: Any = type(weight)
        self._facts = {
            name: part for name, part in weight.parts.items() if not isinstance(part, Tensor)
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.quantized.tensors().items():
            destination[f"{prefix}{name}"] = tensor
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
        found = {
            key.removeprefix(prefix): state_dict[key]
            for key in state_dict
            if key.startswith(prefix)
        }
        known = {"bias"} if self.bias is not None else set()
        missing_keys += [prefix + key for key in known - found.keys()]
        weight = {key: tensor for key, tensor in found.items() if key not in known}
        if not weight:
            missing_keys.append(f"{prefix}weight")
        else:
            try:
                self._take(self.quantized.reread(weight, f"{prefix}weight"), prefix, error_msgs)
            except CheckpointError as error:
                error_msgs.append(str(error))
        known |= self.quantized.tensors().keys()
        if self.bias is not None and "bias" in found:
            with torch.no_grad():
                self.bias.copy_(found["bias"])
        unexpected_keys += [prefix + key for key in found if key not in known]

    def _take(self, weight: PackedWeight, prefix: str, error_msgs: list[str]) -> None:
        whole = self.quantized
        if weight.shape != whole.shape:
            error_msgs.append(f"{prefix}weight has shape {weight.shape}, expected {whole.shape}")
            return
        device = next(iter(whole.storage.values())).device
        for name in self._buffers:
            self._buffers[name] = None
        self._hold(weight)
        for name, tensor in self._buffers.items():
            self._buffers[name] = None if tensor is None else tensor.to(device, copy=True)


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
    quantizer = FORMATS[format_name(format)]
    names = [name for name, _ in decoder.named_modules() if name]
    skipped = (*DEFAULT_SKIP, *skip)
    check_skip(skipped, names)
    replaced = []
    for name in names:
        linear = decoder.get_submodule(name)
        # Exactly torch's: a class derived from it may do more than multiply.
        dense = isinstance(linear, Linear | StoredLinear) or type(linear) is nn.Linear
        if not dense or place_of(decoder, name) != "layers":
            continue
        assert isinstance(linear, Linear | StoredLinear | nn.Linear)
        if any(covers(entry, name) for entry in skipped):
            continue
        weight = linear.dequantized() if isinstance(linear, StoredLinear) else linear.weight
        decoder.set_submodule(name, QuantizedLinear(quantizer(weight), linear.bias))
        replaced.append(name)
    return replaced


def check_skip(skip: tuple[str, ...], names: list[str]) -> None:
    """Raises: ConfigError for an entry beside the default that covers no module."""
    parts = sorted({part for name in names for part in name.split(".")} | set(names))
    for entry in skip:
        if entry in DEFAULT_SKIP or any(covers(entry, name) for name in names):
            continue
        near = difflib.get_close_matches(entry, parts, n=3) or parts[:3]
        raise ConfigError(f"skip entry {entry!r} matches no module; did you mean {near}?")


def covers(entry: str, name: str) -> bool:
    """Whether the dotted `name` contains `entry` as whole parts."""
    return f".{entry}." in f".{name}."

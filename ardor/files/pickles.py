"""Weights as PyTorch pickled them (.bin), for checkpoints that were never published otherwise.

A pickle is a program. Here torch's restricted reader runs it, which builds tensors and nothing
else; it is still read only when asked for, since such readers have had holes.
Source: CVE-2025-32434, in torch before 2.6.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ardor.errors import CheckpointError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class _Header(NamedTuple):
    """What is known of a tensor without reading it, as safetensors' slices say it."""

    tensor: Tensor
    codes: Mapping[torch.dtype, str]

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return self.codes.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))


class Pickle:
    """One file, with the methods that a safetensors file has. Tensors stay mapped, not read."""

    def __init__(self, tensors: Mapping[str, Tensor], codes: Mapping[torch.dtype, str]):
        self._tensors, self._codes = tensors, codes

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> _Header:
        return _Header(self._tensors[name], self._codes)


def open_pickle(path: Path, codes: Mapping[torch.dtype, str]) -> Pickle:
    """The tensors of a pickled state dict; `codes` are the names of dtypes in safetensors.

    Files from before torch 1.6 cannot be mapped: they are read whole.

    Raises: CheckpointError if the file is damaged, asks for more than tensors, or holds other
    things than tensors by name.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other forms of pickles: an error says more
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # bytes of any kind make the reader fail in any way
        raise CheckpointError(_refusal(path, error)) from error
    return Pickle(dict(_tensors(held, path)), codes)


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    if asked := re.search(r"GLOBAL (\S+)", text):  # what the file would import
        return (
            f"{path} asks for {asked[1]}, which is no tensor and could run code; it was not run: "
            "take a safetensors file, or weights from a source that you trust"
        )
    reason = (text.rpartition("WeightsUnpickler error: ")[2] or type(error).__name__).split("\n")[0]
    return (
        f"{path} was not written by torch.save, or is damaged or cut short "
        f"({path.stat().st_size} bytes): {reason[:200]}; download or write it again"
    )


def _tensors(held: object, path: Path) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(held, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(held).__name__}, expected tensors by name; give the file that "
            "the model's save_pretrained wrote"
        )
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor; give the file "
                "that the model's save_pretrained wrote, not a trainer's state"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{path}: {name!r} is stored as {value.layout}, which is not read; convert it to "
                "a plain tensor"
            )
        yield name, value.detach()

"""Tensors of a safetensors file in a mapping whose pages can be asked for and given back.

What is mapped takes memory only once it is read, and page by page. Nothing is to be written to it.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ardor.errors import CheckpointError
from ardor.files.atomic import explained
from ardor.files.weights import open_file, write_tensors

SOURCE = "__source__"  # a tensor of bytes beside the others, which says what they were made from


@dataclass(frozen=True)
class Region:
    """The bytes of one tensor in a mapped file."""

    mapping: mmap.mmap
    start: int
    length: int

    def expect(self) -> None:
        """Have the system read these bytes from the disk, without waiting for them."""
        first = self.start - self.start % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", first, self.start + self.length - first)

    def give_back(self) -> None:
        """Let go of the whole pages of these bytes: they are read from the file when needed again.

        What shares a page with a neighbour stays.
        """
        first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self.start + self.length) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._advise("MADV_DONTNEED", first, end - first)

    def _advise(self, name: str, first: int, length: int) -> None:
        # Advice that a system does not know is not needed: it changes no result.
        if hasattr(mmap, name):
            with suppress(OSError):
                self.mapping.madvise(getattr(mmap, name), first, length)


class MappedFile:
    """One safetensors file, mapped as a whole.

    Raises: CheckpointError if it is missing or damaged.
    """

    def __init__(self, path: Path):
        self._files = open_file(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            self._start = 8 + length
            self._offsets = {name: header[name]["data_offsets"] for name in self._files.names()}
            # A copy on write, as torch knows no tensor that must not be written.
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def names(self) -> tuple[str, ...]:
        return self._files.names()

    def aligned(self, name: str) -> bool:
        """Whether the tensor begins where its dtype may begin in memory."""
        return (self._start + self._offsets[name][0]) % self._files.dtype(name).itemsize == 0

    def tensor(self, name: str) -> tuple[Tensor, Region]:
        """The tensor, with no byte of it read, and where it lies."""
        dtype, shape = self._files.dtype(name), self._files.shape(name)
        first, end = (self._start + offset for offset in self._offsets[name])
        region = Region(self._mapping, first, end - first)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype), region
        count = math.prod(shape)
        flat = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=first)
        return flat.view(shape), region


def write_made(path: Path, tensors: Mapping[str, Tensor], source: str) -> None:
    """Write what was made from `source`: it appears whole under its name, or not at all.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    said = torch.tensor([*source.encode()], dtype=torch.uint8)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(partial, {**tensors, SOURCE: said})
        with explained(path):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_made(path: Path, source: str) -> MappedFile | None:
    """What `write_made` wrote, if it is whole and of the same source."""
    try:
        found = MappedFile(path)
    except CheckpointError:
        return None
    if SOURCE not in found.names():
        return None
    said = bytes(found.tensor(SOURCE)[0].tolist()).decode(errors="replace")
    return found if said == source else None

"""Where encoded examples go while a dataset is built: memory, or files that are then mapped."""

import mmap
import zlib
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ardor.errors import DataError

# Field of `Arrays` -> its type on the disk, in which the file is named too: tokens.i4.
DTYPES = {"tokens": "<i4", "supervised": "|b1", "lengths": "<i8", "rows": "<i8", "unended": "|b1"}
CHUNK = 1 << 22  # bytes read at once where whole files are


class Arrays(NamedTuple):
    tokens: np.ndarray  # int32, of all examples end to end
    supervised: np.ndarray  # bool, as long
    lengths: np.ndarray  # int64, tokens of each example
    rows: np.ndarray  # int64: the row that each example came from
    unended: np.ndarray  # bool: has the example lost its end to the length limit?


class MemoryStore:
    """Arrays that grow in memory."""

    def __init__(self) -> None:
        self.tokens, self.supervised = array("i"), bytearray()
        self.lengths, self.rows, self.unended = array("q"), array("q"), bytearray()

    def append(
        self, tokens: np.ndarray, supervised: np.ndarray, *, row: int, unended: bool = False
    ) -> None:
        self.tokens.frombytes(tokens.astype(np.int32, copy=False).tobytes())
        self.supervised += supervised.tobytes()
        self.lengths.append(len(tokens))
        self.rows.append(row)
        self.unended.append(unended)

    def finish(self) -> Arrays:
        """The arrays, without a copy."""
        return Arrays(
            np.frombuffer(self.tokens, dtype=np.int32),
            np.frombuffer(self.supervised, dtype=np.bool_),
            np.frombuffer(self.lengths, dtype=np.int64),
            np.frombuffer(self.rows, dtype=np.int64),
            np.frombuffer(self.unended, dtype=np.bool_),
        )


class FileStore:
    """Files of a directory, written as examples come; in memory is only a buffer of each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = {
            name: open(_file(directory, name), "wb", buffering=1 << 18)  # noqa: SIM115 (finish)
            for name in DTYPES
        }

    def append(
        self, tokens: np.ndarray, supervised: np.ndarray, *, row: int, unended: bool = False
    ) -> None:
        values = (tokens, supervised, len(tokens), row, unended)
        for (name, dtype), value in zip(DTYPES.items(), values, strict=True):
            self.files[name].write(np.asarray(value, dtype=dtype).tobytes())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self) -> Arrays:
        """The files, mapped."""
        self.close()
        return mapped(self.directory)


Store = MemoryStore | FileStore


def mapped(directory: Path) -> Arrays:
    """The arrays of a directory that a FileStore has filled, read as they are touched.

    Raises: DataError if a file is missing or they do not fit each other.
    """
    found = {}
    for name, dtype in DTYPES.items():
        path = _file(directory, name)
        size = path.stat().st_size if path.is_file() else 0
        if not size or size % np.dtype(dtype).itemsize:
            raise DataError(f"{path} is missing, empty or cut short; delete {directory}")
        with path.open("rb") as file:
            # Not np.memmap: its objects carry the file's name into every slice and pickle.
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found[name] = np.frombuffer(view, dtype=dtype)
    arrays = Arrays(**found)
    counts = {len(arrays.lengths), len(arrays.rows), len(arrays.unended)}
    if len(counts) > 1 or {int(arrays.lengths.sum())} != {
        len(arrays.tokens),
        len(found["supervised"]),
    }:
        raise DataError(f"the files of {directory} do not fit each other; delete it")
    return arrays


def checksums(directory: Path) -> dict[str, int]:
    """The CRC-32 of each file."""
    found = {}
    for name in DTYPES:
        value = 0
        with _file(directory, name).open("rb") as file:
            while chunk := file.read(CHUNK):
                value = zlib.crc32(chunk, value)
        found[name] = value
    return found


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.{DTYPES[name][1:]}"

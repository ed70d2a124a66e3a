"""Where encoded examples go while a dataset is built: memory, or files that are then mapped.

A mapped file is locked for as long as anything of it is in use, so that nobody removes it.
"""

import fcntl
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ardor.errors import DataError

# Field of `Arrays` -> its type on the disk, in which the file is named too: tokens.i4.
DTYPES = {"tokens": "<i4", "supervised": "|b1", "lengths": "<i8", "rows": "<i8", "unended": "|b1"}
JUDGED_DTYPES = DTYPES | {"firsts": "<i8", "liked": "|b1"}
CHUNK = 1 << 22  # bytes read at once where whole files are


class Arrays(NamedTuple):
    tokens: np.ndarray  # int32, of all examples end to end
    supervised: np.ndarray  # bool, as long
    lengths: np.ndarray  # int64, tokens of each example
    rows: np.ndarray  # int64: the row that each example came from
    unended: np.ndarray  # bool: has the example lost its end to the length limit?
    firsts: np.ndarray | None = None  # int64, of judged examples: tokens of the first document
    liked: np.ndarray | None = None  # bool, of judged examples: is that one the better, or good?


class MemoryStore:
    """Arrays that grow in memory."""

    def __init__(self, dtypes: Mapping[str, str] = DTYPES) -> None:
        self.dtypes = dtypes
        self.columns = {name: bytearray() for name in dtypes}

    def append(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        *,
        row: int,
        unended: bool = False,
        **judged: int,
    ) -> None:
        """Another example; `judged` are its `firsts` and `liked` where the store has them."""
        values = (tokens, supervised, len(tokens), row, unended)
        for name, raw in _raw(self.dtypes, values, judged):
            self.columns[name] += raw

    def scratch(self) -> "MemoryStore":
        """Another store, for what is needed only until this one is finished."""
        return MemoryStore(self.dtypes)

    def finish(self) -> Arrays:
        """The arrays, without a copy."""
        return Arrays(
            **{name: np.frombuffer(self.columns[name], dtype=d) for name, d in self.dtypes.items()}
        )


class FileStore:
    """Files of a directory, written as examples come; in memory is only a buffer of each."""

    def __init__(
        self, directory: Path, dtypes: Mapping[str, str] = DTYPES, *, keep: bool = True
    ) -> None:
        self.directory, self.dtypes, self.keep = directory, dtypes, keep
        self.files = {
            name: open(_file(directory, name, dtype), "wb", buffering=1 << 18)  # noqa: SIM115 (close)
            for name, dtype in dtypes.items()
        }
        self.scratches: list[FileStore] = []
        for file in self.files.values():
            _lock(file)

    def append(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        *,
        row: int,
        unended: bool = False,
        **judged: int,
    ) -> None:
        """Another example; `judged` are its `firsts` and `liked` where the store has them."""
        values = (tokens, supervised, len(tokens), row, unended)
        for name, raw in _raw(self.dtypes, values, judged):
            self.files[name].write(raw)

    def scratch(self) -> "FileStore":
        """Another store within, for what is needed only until this one is finished."""
        made = FileStore(Path(tempfile.mkdtemp(dir=self.directory)), self.dtypes, keep=False)
        self.scratches.append(made)
        return made

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, even if the disk is full
            for one in (*self.files.values(), *self.scratches):
                closing.callback(one.close)
        if not self.keep:
            # What is mapped stays readable.
            shutil.rmtree(self.directory, ignore_errors=True)

    def finish(self) -> Arrays:
        """The files, mapped; those of a scratch store are gone from the disk."""
        for file in self.files.values():
            file.flush()
        arrays = mapped(self.directory, self.dtypes)
        self.close()
        return arrays


Store = MemoryStore | FileStore


def mapped(directory: Path, dtypes: Mapping[str, str] = DTYPES) -> Arrays:
    """The arrays of a directory that a FileStore has filled, read as they are touched.

    Raises: DataError if a file is missing or they do not fit each other, or somebody is removing
    them.
    """
    found = {}
    for name, dtype in dtypes.items():
        path = _file(directory, name, dtype)
        size = path.stat().st_size if path.is_file() else 0
        if not size or size % np.dtype(dtype).itemsize:
            raise DataError(f"{path} is missing, empty or cut short; delete {directory}")
        with path.open("rb") as file:
            _lock(file)
            # Not np.memmap: its objects carry the file's name into every slice and pickle. A map
            # has its own handle of the file, so the lock lasts as long as the map.
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found[name] = np.frombuffer(view, dtype=dtype)
    arrays = Arrays(**found)
    lengths = {"tokens": int(arrays.lengths.sum()), "supervised": int(arrays.lengths.sum())}
    if any(len(values) != lengths.get(name, len(arrays.rows)) for name, values in found.items()):
        raise DataError(f"the files of {directory} do not fit each other; delete it")
    return arrays


def checksums(directory: Path, dtypes: Mapping[str, str] = DTYPES) -> dict[str, int]:
    """The CRC-32 of each file."""
    found = {}
    for name, dtype in dtypes.items():
        value = 0
        with _file(directory, name, dtype).open("rb") as file:
            while chunk := file.read(CHUNK):
                value = zlib.crc32(chunk, value)
        found[name] = value
    return found


def remove(directory: Path) -> bool:
    """Remove what a FileStore has filled, unless a process writes or maps it, or nobody can tell.

    A reader finds all of it or nothing; `clean_partials` ends what is interrupted.
    """
    gone = directory.with_name(f".{directory.name.lstrip('.')}.partial-{os.getpid()}")
    try:
        # For writing, without which a lock that excludes others is refused on NFS.
        with _file(directory, "tokens", DTYPES["tokens"]).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(directory, gone)
            shutil.rmtree(gone)
    except OSError:
        return False
    return True


def _raw(
    dtypes: Mapping[str, str], values: tuple[Any, ...], judged: Mapping[str, int]
) -> Iterator[tuple[str, bytes]]:
    """The bytes of an example for each array."""
    given = {**dict(zip(DTYPES, values, strict=True)), **judged}
    for name, dtype in dtypes.items():
        yield name, np.asarray(given[name], dtype=dtype).tobytes()


def _lock(file: BinaryIO) -> None:
    """Share the file with other readers, as long as a handle of it is open.

    Raises: DataError if somebody removes it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{file.name} is being removed") from error
    except OSError:
        # A disk without locks, where `remove` fails too.
        return


def _file(directory: Path, name: str, dtype: str) -> Path:
    return directory / f"{name}.{dtype[1:]}"

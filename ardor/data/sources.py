"""Rows from files, folders or the Hugging Face hub; each row knows the file and line it is from."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ardor.data.readers import READERS, TABLES, Row, as_row, file_rows, kind_of, known
from ardor.errors import DataError
from ardor.files.hub import dataset_unreachable

Rows = str | Path | Iterable[Mapping[str, Any]]


class Source:
    """Rows that can be gone through again and again, each time read as they are asked for.

    `rows` is a file (JSON Lines, JSON, CSV, TSV, Parquet, or a text file, which is one row
    {"text": ...}; all but Parquet may be packed with gzip, zstd, bzip2 or xz), a folder of such
    files taken in sorted order, a hub dataset ("owner/name", or "owner/name:configuration"), or
    rows in memory.

    `split` picks the files of a folder that are named or foldered after it ("train.jsonl",
    "train-00001.parquet", "train/a.jsonl"), or a split of a hub dataset, where None means "train".
    A hub dataset that is `streaming` is fetched as it is read, each time anew, and never kept.

    Raises: DataError if nothing is there, or a folder holds several splits and none is named. When
    iterated: if a row cannot be read (with file and line), or there are no rows at all.
    """

    def __init__(
        self, rows: Rows, split: str | None = None, *, streaming: bool = False, part: int = 0
    ) -> None:
        self.part, self.streaming = part, streaming
        self._memory: Iterable[Mapping[str, Any]] | None = None
        self._hub: tuple[str, str] | None = None
        self._loaded: Any = None
        self.files: list[Path] = []
        if not isinstance(rows, str | Path):
            self.name, self._memory = "the given list", rows
            return
        if not str(rows):  # as a path it would be the current directory
            raise DataError("data has an empty name; give a file, a folder or a hub dataset")
        path = Path(rows).expanduser()
        self.name = str(path)
        if path.is_dir():
            self.files = _folder_files(path, split)
        elif path.is_file():
            if split is not None:
                raise DataError(f"{path} is one file and has no split {split!r}; drop the split")
            self.files = [path]
        elif _looks_like_a_path(str(rows)):
            raise DataError(_missing(path))
        else:
            self.name, self._hub = str(rows), (str(rows), split or "train")

    def __iter__(self) -> Iterator[Row]:
        if self._memory is not None:
            rows = (as_row(row, f"row {i}") for i, row in enumerate(self._memory, 1))
        elif self._hub is not None:
            rows = self._hub_rows(*self._hub)
        else:
            rows = (row for file in self.files for row in file_rows(file))
        if self.part:
            rows = (replace(row, part=self.part) for row in rows)
        yield from _not_empty(rows, self.name)

    def first_rows(self) -> Iterator[Row]:
        """The first row of each file that has one, and of what is no file."""
        if not self.files:
            yield next(iter(self))
            return
        seen_text = False
        for file in self.files:
            # All text files are in one format, and reading a row reads all of one.
            if (text := kind_of(file) not in TABLES) and seen_text:
                continue
            seen_text = seen_text or text
            yield from islice(file_rows(file), 1)

    def identity(self) -> list[str] | None:
        """What tells these rows from others: hashes of their files; None if nothing does."""
        if self._hub is not None and not self.streaming:
            fingerprint = getattr(self._dataset(*self._hub), "_fingerprint", None)
            return None if fingerprint is None else [*self._hub, fingerprint]
        if not self.files:
            return None
        return [f"{file.name} {_hash(file)}" for file in self.files]

    @property
    def bytes(self) -> int | None:
        """Size of the files; None where there are none."""
        return sum(file.stat().st_size for file in self.files) if self.files else None

    def _hub_rows(self, source: str, split: str) -> Iterator[Row]:
        for number, values in enumerate(self._dataset(source, split), 1):
            where = f"{source}[{split}] row {number}"
            yield as_row(values, where, f"{source}[{split}]")

    def _dataset(self, source: str, split: str) -> Any:
        if self._loaded is None:
            self._loaded = _load_hub(source, split, self.streaming)
        return self._loaded


def read_rows(rows: Rows, split: str | None = None) -> Iterator[Row]:
    """The rows of a Source, in order, read as they are asked for.

    Raises: DataError as `Source` does, and its iteration.
    """
    return iter(Source(rows, split))


def _hash(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _not_empty(rows: Iterator[Row], name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name} holds no rows; give a dataset with at least one")
    yield first
    yield from rows


# ---- which files ----


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and kind_of(path) in READERS and not _hidden(path.relative_to(folder))
    ]
    if any(kind_of(path) in TABLES for path in files):
        # A card beside the data is about it, not part of it.
        files = [path for path in files if path.stem.lower() not in ("readme", "license")]
    if not files:
        raise DataError(f"{folder} holds no file that can be read; known are {known()}")
    names = {path: _split_of(path.relative_to(folder)) for path in files}
    if split is not None:
        chosen = [path for path in files if names[path] == _SPLITS.get(split, split)]
        if not chosen:
            found = ", ".join(sorted({name for name in names.values() if name})) or "none"
            raise DataError(f"{folder} has no files of split {split!r}; splits found: {found}")
        return chosen
    tables = {names[path] for path in files if kind_of(path) in TABLES} - {None}
    if len(tables) > 1:
        found = ", ".join(sorted(str(name) for name in tables))
        raise DataError(f"{folder} holds the splits {found}; name the one to read with split=")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}


def _split_of(path: Path) -> str | None:
    """The split that a file is named after, or its folder: `path` is relative to the dataset."""
    first = re.split(r"[-_.]", path.name.lower())[0]
    for name in (first, *(part.lower() for part in reversed(path.parent.parts))):
        if name in _SPLITS:
            return _SPLITS[name]
    return None


def _looks_like_a_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or source.endswith("/")
        or kind_of(Path(source)) in READERS
        or ("/" in source and Path(source).parent.is_dir())
    )


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, and neither does the folder {path.parent}"
    beside = sorted(found.name for found in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    if near:
        return f"{path} does not exist; nearest in {path.parent}: {', '.join(near)}"
    known = [name for name in beside if kind_of(Path(name)) in READERS][:8]
    listing = ", ".join(known) or "no file that can be read"
    return f"{path} does not exist; {path.parent} holds {listing}"


# ---- the hub ----


def _load_hub(source: str, split: str, streaming: bool) -> Any:
    name, _, configuration = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} is no file here; to fetch it from the hub, pip install datasets"
        ) from None
    if dataset_unreachable(name):
        raise DataError(
            f"{source} is no file or folder here, and the hub cannot be reached; check the name "
            "and the network, or pass a local file"
        )
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(name, configuration or None, split=split, **options)
    # Everything that goes wrong in there is about the name, the split, or the network.
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{source} is no file or folder here, and its split {split!r} could not be had from "
            f"the hub: {reason}; check the name and the network, or pass a local file"
        ) from error

"""Rows from files, folders or the Hugging Face hub; each row knows the file and line it is from."""

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ardor.errors import DataError
from ardor.files.hub import dataset_unreachable

Source = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    values: Mapping[str, Any]
    where: str  # for people: "pairs.jsonl:17"
    file: str = ""  # rows of one file share one format
    part: int = 0  # of a mixture


def read_rows(source: Source, split: str | None = None) -> Iterator[Row]:
    """The rows of `source`, in order, read as they are asked for.

    `source` is a file (JSON Lines, JSON, CSV, Parquet, or a text file, which is one row
    {"text": ...}; all but Parquet may be .gz), a folder of such files taken in sorted order, a hub
    dataset ("owner/name", or "owner/name:configuration"), or rows in memory.

    `split` picks the files of a folder that are named or foldered after it ("train.jsonl",
    "train-00001.parquet", "train/a.jsonl"), or a split of a hub dataset, where None means "train".

    Raises: DataError if nothing is there, a row cannot be read (with file and line), a folder
    holds several splits and none is named, or there are no rows at all.
    """
    if not isinstance(source, str | Path):
        found = (Row(_mapping(row, f"row {i}"), f"row {i}") for i, row in enumerate(source, 1))
        yield from _not_empty(found, "the given list")
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path, split)
        yield from _not_empty((row for file in files for row in _file_rows(file)), str(path))
    elif path.is_file():
        if split is not None:
            raise DataError(f"{path} is one file and has no split {split!r}; drop the split")
        yield from _not_empty(_file_rows(path), str(path))
    elif _looks_like_a_path(str(source)):
        raise DataError(_missing(path))
    else:
        yield from _not_empty(_hub_rows(str(source), split or "train"), str(source))


def _not_empty(rows: Iterator[Row], name: str) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name} holds no rows; give a dataset with at least one")
    yield first
    yield from rows


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found {type(value).__name__}, expected an object with named columns, "
            'as in {"prompt": ..., "completion": ...}'
        )
    return value


# ---- which files ----


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _kind(path) in READERS and not _hidden(path.relative_to(folder))
    ]
    if any(_kind(path) in TABLES for path in files):
        # A card beside the data is about it, not part of it.
        files = [path for path in files if path.stem.lower() not in ("readme", "license")]
    if not files:
        raise DataError(f"{folder} holds no file that can be read; known are {_known()}")
    names = {path: _split_of(path.relative_to(folder)) for path in files}
    if split is not None:
        chosen = [path for path in files if names[path] == _SPLITS.get(split, split)]
        if not chosen:
            found = ", ".join(sorted({name for name in names.values() if name})) or "none"
            raise DataError(f"{folder} has no files of split {split!r}; splits found: {found}")
        return chosen
    tables = {names[path] for path in files if _kind(path) in TABLES} - {None}
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
        or _kind(Path(source)) in READERS
        or ("/" in source and Path(source).parent.is_dir())
    )


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, and neither does the folder {path.parent}"
    beside = sorted(found.name for found in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    if near:
        return f"{path} does not exist; nearest in {path.parent}: {', '.join(near)}"
    known = [name for name in beside if _kind(Path(name)) in READERS][:8]
    listing = ", ".join(known) or "no file that can be read"
    return f"{path} does not exist; {path.parent} holds {listing}"


def _known() -> str:
    return ", ".join(sorted(READERS)) + " (and all but .parquet with .gz)"


# ---- one file ----


def _file_rows(path: Path) -> Iterator[Row]:
    reader = READERS.get(_kind(path))
    if reader is None:
        raise DataError(f"{path} has an unknown kind {path.suffix!r}; known are {_known()}")
    try:
        yield from reader(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text (byte {error.start}: {error.reason}); convert it first, "
            "as with iconv -t utf-8"
        ) from None


def _whole(path: Path) -> str:
    with _open(path) as file:
        return _text(file.read(), str(path))


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):  # bytes: only \n ends a line
            where = f"{path}:{number}"
            line = _text(raw, where).strip()
            if line:
                yield Row(_mapping(_json(line, where), where), where, str(path))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.colno}: {error.msg}; "
            "expected one object per line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or of brackets
        raise DataError(
            f"{where}: this JSON cannot be read: {error}; mend or drop the row"
        ) from None


def _json_file(path: Path) -> Iterator[Row]:
    text = _whole(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            yield from _json_lines(path)  # JSON Lines under the other name are common
            return
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this JSON cannot be read: {error}; mend the file") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        where = f"{path} row {number}"
        yield Row(_mapping(row, where), where, str(path))


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(_whole(path), newline=""), delimiter=delimiter, strict=True)
    end = 0
    try:
        columns = reader.fieldnames
        end = reader.line_num
        for values in reader:
            where = f"{path}:{end + 1}"  # where the row starts: quoted cells may span lines
            end = reader.line_num
            if None in values or None in values.values():
                raise DataError(
                    f"{where}: the row does not have the {len(columns or ())} cells of "
                    f"the header {columns}; quote cells that contain {delimiter!r}"
                )
            yield Row(values, where, str(path))
    except csv.Error as error:
        raise DataError(f"{path}:{end + 1}: {error}; JSON Lines has no such limits") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow; install it with pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, values in enumerate(rows, 1):
                yield Row(values, f"{path} row {number}", str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _text_file(path: Path) -> Iterator[Row]:
    yield Row({"text": _whole(path)}, str(path), str(path))


TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
TEXTS = dict.fromkeys((".txt", ".md", ".rst", ".py"), _text_file)
READERS = TABLES | TEXTS


# ---- the hub ----


def _hub_rows(source: str, split: str) -> Iterator[Row]:
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
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    # Everything that goes wrong in there is about the name, the split, or the network.
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{source} is no file or folder here, and its split {split!r} could not be had from "
            f"the hub: {reason}; check the name and the network, or pass a local file"
        ) from error
    for number, values in enumerate(rows, 1):
        where = f"{source}[{split}] row {number}"
        yield Row(_mapping(values, where), where, f"{source}[{split}]")

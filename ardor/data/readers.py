"""The rows of one file, of whatever kind, read as they are asked for."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from ardor.errors import DataError

LARGEST = 1 << 28  # bytes of one row, or of a text file, which is one
PACKED = (".gz", ".zst", ".bz2", ".xz")
_FIRST = 1 << 16  # bytes of a JSON array that are read first; twice as many where a row needs them


@dataclass(frozen=True, slots=True)
class Row:
    values: Mapping[str, Any]
    where: str  # for people: "pairs.jsonl:17"
    file: str = ""  # rows of one file share one format
    part: int = 0  # of a mixture


def as_row(value: object, where: str, file: str = "") -> Row:
    """The row of a value.

    Raises: DataError if it is no object.
    """
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found {type(value).__name__}, expected an object with named columns, "
            'as in {"prompt": ..., "completion": ...}'
        )
    return Row(value, where, file)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, whatever it is packed with."""
    name = Path(path.name.lower())
    return (Path(name.stem) if name.suffix in PACKED else name).suffix


def known() -> str:
    """The kinds of files that can be read, for a message."""
    packed = ", ".join(PACKED)
    return ", ".join(sorted(READERS)) + f" (and all but .parquet with one of {packed})"


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file.

    Raises: DataError, with the line or row, for what cannot be read.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        raise DataError(f"{path} has an unknown kind {path.suffix!r}; known are {known()}")
    try:
        yield from reader(path)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged: {error}; fetch or compress it again") from error
    except OSError as error:
        if path.suffix.lower() in PACKED and error.errno is None:  # pyarrow and bz2
            raise DataError(f"{path} is damaged: {error}; fetch or compress it again") from error
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return _open_zst(path)
    return path.open("rb")


def _open_zst(path: Path) -> io.BufferedIOBase:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path} needs pyarrow; install it with pip install pyarrow") from None
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text (byte {error.start}: {error.reason}); convert it first, "
            "as with iconv -t utf-8"
        ) from None


def _too_large(where: str) -> DataError:
    return DataError(
        f"{where} is larger than {LARGEST >> 20} MiB, which is no row that a model can learn from; "
        "divide it into several rows or files"
    )


def _whole(path: Path) -> str:
    with _open(path) as file:
        raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise _too_large(str(path))
        return _text(raw, str(path))


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        # Bytes: only \n ends a line.
        for number, raw in enumerate(iter(lambda: file.readline(LARGEST + 1), b""), 1):
            where = f"{path}:{number}"
            if len(raw) > LARGEST:
                raise _too_large(where)
            line = _text(raw, where).strip()
            if line:
                yield as_row(_json(line, where), where, str(path))


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
    """A list of rows, one row, or JSON Lines under the other name."""
    with _open(path) as file:
        first = file.readline(LARGEST + 1).removeprefix(codecs.BOM_UTF8).strip()
    if first.startswith(b"["):
        yield from _json_list(path)
        return
    try:
        json.loads(first)
        lines = True
    except (ValueError, RecursionError):  # also not UTF-8
        lines = False
    if lines:
        yield from _json_lines(path)
        return
    text = _whole(path)
    if not text.strip():
        return
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad_json(path, error, error.lineno, error.colno) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this JSON cannot be read: {error}; mend the file") from None
    rows = row if isinstance(row, list) else [row]  # a list after blank lines
    for number, value in enumerate(rows, 1):
        where = f"{path} row {number}"
        yield as_row(value, where, str(path))


def _bad_json(path: Path, error: json.JSONDecodeError, line: int, column: int) -> DataError:
    return DataError(f"{path}:{line}: not valid JSON at column {column}: {error.msg}")


def _json_list(path: Path) -> Iterator[Row]:
    """The items of a JSON list, which is never whole in memory."""
    with _open(path) as file:
        reading = _Reading(path, file)
        reading.skip("[")
        if reading.skip("]"):
            return
        number = 0
        while True:
            number += 1
            where = f"{path} row {number}"
            yield as_row(reading.value(where), where, str(path))
            if not reading.skip(","):
                break
        if not reading.skip("]"):
            raise reading.broken(json.JSONDecodeError("Expecting ',' delimiter", reading.text, 0))


class _Reading:
    """A window on a JSON text that grows as it needs to."""

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        self.path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._size = _FIRST
        self.text, self._ended = "", False
        self._line, self._column = 1, 1  # of the window's start

    def skip(self, sign: str) -> bool:
        """Go past white space and, if it comes next, `sign`; was it there?"""
        while True:
            found = len(self.text) - len(self.text.lstrip(" \t\r\n"))
            self._drop(found)
            if self.text or not self._more():
                break
        if not self.text.startswith(sign):
            return False
        self._drop(len(sign))
        return True

    def value(self, where: str) -> Any:
        """The value that comes next."""
        self._size = _FIRST
        self.skip("")
        while True:
            try:
                found, end = self._json.raw_decode(self.text)
            except json.JSONDecodeError as error:
                # Broken, or only cut off by the window.
                if not self._more():
                    raise self.broken(error) from None
                if len(self.text) > LARGEST:
                    raise _too_large(where) from None
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.path}: this JSON cannot be read: {error}; mend the file"
                ) from None
            self._drop(end)
            return found

    def broken(self, error: json.JSONDecodeError) -> DataError:
        """The error with its place in the file."""
        line = self._line + error.lineno - 1
        column = error.colno + (self._column - 1 if error.lineno == 1 else 0)
        return _bad_json(self.path, error, line, column)

    def _more(self) -> bool:
        if self._ended:
            return False
        raw = self._file.read(self._size)
        self._size *= 2
        self._ended = not raw
        try:
            self.text += self._decode.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n") + raw.count(b"\n", 0, error.start)
            raise DataError(
                f"{self.path}:{line} is not UTF-8 text ({error.reason}); convert it first, "
                "as with iconv -t utf-8"
            ) from None
        return True

    def _drop(self, count: int) -> None:
        lines = self.text.count("\n", 0, count)
        self._line += lines
        if lines:
            self._column = count - self.text.rindex("\n", 0, count)
        else:
            self._column += count
        self.text = self.text[count:]


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    end = 0
    with io.TextIOWrapper(cast(IO[bytes], _open(path)), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
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
        except UnicodeDecodeError:
            _find_bad_line(path)
            raise


def _find_bad_line(path: Path) -> None:
    """Raises: DataError with the line that is not UTF-8."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            _text(raw, f"{path}:{number}")


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

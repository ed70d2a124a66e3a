"""JSON files: read with errors that point at the place, written whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

from ardor.errors import CheckpointError
from ardor.files.atomic import write_atomic

# A string, kept as it is, or a comma that nothing follows.
_STRING_OR_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Trailing commas are forgiven: published checkpoints have them.

    Raises: CheckpointError if the file is missing, unreadable or not JSON (with line and column).
    """
    path = Path(path)
    return parse_json(read_text(path), path)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: CheckpointError as `read_json`, and if the file holds a list, a string or a number.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        found = type(value).__name__
        raise CheckpointError(
            f"{path} holds a JSON {found}, expected an object; mend or replace it"
        )
    return value


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, byte for byte (line ends are kept).

    Raises: CheckpointError if the file is missing, unreadable or not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        beside = sorted(found.name for found in path.parent.glob("*.json"))
        found = f"found {', '.join(beside)}" if beside else "no JSON file is there"
        raise CheckpointError(f"{path} does not exist; {found}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason}") from error


def parse_json(text: str, path: str | Path) -> Any:
    """The value of `text`, which was read from `path`.

    Raises: CheckpointError if it is not JSON, even without its trailing commas.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        forgiven = _STRING_OR_TRAILING_COMMA.sub(lambda match: match[1] or "", text)
        try:
            return json.loads(forgiven)
        except json.JSONDecodeError:
            where = f"line {error.lineno}, column {error.colno}"
            raise CheckpointError(
                f"{path} is not valid JSON: {error.msg} at {where}; mend or replace the file"
            ) from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as transformers does: two spaces, sorted keys, a newline at the end; atomic.

    Raises: CheckpointError if it cannot be written; TypeError if `value` is not plain JSON.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n")

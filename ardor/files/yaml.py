"""YAML files: read with the line of every key, and written from a dataclass."""

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ardor.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Takes 1e-5, too, for a number: YAML 1.1 wants a point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


class YamlFile(NamedTuple):
    values: dict[str, Any]
    lines: dict[str, int]  # top-level key -> its line, counted from 1


def read_yaml(path: Path) -> YamlFile:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises: ConfigError if the file is missing, is not valid YAML (with the line), holds something
    else than a mapping, or gives one key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}; give a YAML file that is there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_invalid(path, error)) from error
    if root is None:
        return YamlFile({}, {})
    if not isinstance(root, yaml.MappingNode):
        found = type(values).__name__
        raise ConfigError(f"{path}: found a {found}, expected `name: value` on each line")
    lines: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise ConfigError(f"{path}, line {line}: found a key that is not a name")
        if key.value in lines:
            first = lines[key.value]
            raise ConfigError(
                f"{path}, line {line}: {key.value!r} was already given on line {first}; keep one"
            )
        lines[key.value] = line
    return YamlFile({str(key): value for key, value in values.items()}, lines)


def _invalid(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error)
    return f"{path}{where}: this is not valid YAML: {problem}"


def to_yaml(config: object, header: str = "") -> str:
    """A dataclass or mapping as YAML that `read_yaml` reads back, in the order of its fields.

    Paths become strings and tuples lists. `header` lines become comments on top.
    """
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value

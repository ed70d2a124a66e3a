"""The JSON schema of a Python function: what a chat template is told of a tool."""

import inspect
import json
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ardor.errors import TextError

Schema = dict[str, Any]

_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_SECTION = re.compile(r"^(Args|Returns|Raises):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"(\w+)(?:\s*\([^()]*\))?:\s*(.*)", re.DOTALL)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE | re.DOTALL)


def schema_of(function: Callable[..., Any]) -> Schema:
    """{"type": "function", "function": {"name", "description", "parameters"}} of `function`.

    The same as transformers makes of it: types from the annotations, descriptions from a docstring
    with an `Args:` section; "(choices: [...])" at an argument's end lists its values.

    Raises: TextError naming what lacks an annotation or a description.
    """
    name = function.__name__
    doc = inspect.getdoc(function)
    if not doc:
        raise TextError(f"the tool {name} has no docstring; describe it and its arguments in one")
    main, said, returned = _described(doc)
    hints = get_type_hints(function)
    properties, required = {}, []
    for place, (key, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if place == 0 and key in ("self", "cls") and key not in hints:
            continue
        if key not in hints:
            raise TextError(f"the tool {name}: argument {key!r} has no type; annotate it")
        if key not in said:
            raise TextError(
                f"the tool {name}: argument {key!r} is not described; add it to Args: in the "
                "docstring"
            )
        schema, text = _schema(hints[key], f"argument {key!r} of the tool {name}"), said[key]
        if choices := _CHOICES.search(text):
            values = json.loads(choices[1])
            schema["enum"] = [v.strip() if isinstance(v, str) else v for v in values]
            text = text[: choices.start()].strip()
        properties[key] = schema | {"description": text}
        if parameter.default is parameter.empty:
            required.append(key)
    parameters: Schema = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    made = {"name": name, "description": main, "parameters": parameters}
    result = _returned(hints, returned)
    return {"type": "function", "function": made | ({} if result is None else {"return": result})}


def _returned(hints: dict[str, Any], described: str | None) -> Schema | None:
    if "return" not in hints:
        return None
    try:
        schema = _schema(hints["return"], "what it returns")
    except TextError:  # it is never generated, so a type that cannot be described does no harm
        return None
    return schema | ({} if described is None else {"description": described})


def _described(doc: str) -> tuple[str, dict[str, str], str | None]:
    """A docstring's first part, its arguments' descriptions, and that of what it returns."""
    main, *rest = _SECTION.split(doc.strip())
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    returned = sections.get("Returns")
    arguments: dict[str, str] = {}
    for entry in _entries(sections.get("Args", "")):
        if found := _ARGUMENT.fullmatch(entry):
            arguments[found[1]] = re.sub(r"\s*\n+\s*", " ", found[2].strip())
    return main.strip(), arguments, None if returned is None else returned.strip()


def _entries(section: str) -> list[str]:
    """The section's entries; a line that is indented more than the first goes on from the last."""
    entries: list[str] = []
    lines = [line for line in section.split("\n") if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        if len(line) - len(line.lstrip()) <= indent or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += "\n" + line
    return entries


def _schema(hint: Any, where: str) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _values([member.value for member in hint], where)
    if origin is Literal:
        return _values(list(args), where)
    if origin in (Union, types.UnionType):
        return _union(args, where)
    if hint in (Any, list, tuple, dict) or hint in _NAMES:
        named = {list: "array", tuple: "array", dict: "object"} | _NAMES
        return {} if hint is Any else {"type": named[hint]}
    if origin is list:
        return {"type": "array", "items": _schema(args[0], where)}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(arg, where) for arg in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], where)}
    raise TextError(
        f"{where}: no JSON schema is known for the type {hint!r}; use int, float, str, bool, "
        "Literal, an Enum, or lists, dicts and unions of them, or give the schema itself"
    )


def _values(values: list[Any], where: str) -> Schema:
    if not values or any(type(value) not in _NAMES for value in values):
        raise TextError(f"{where}: its choices are {values!r}; expected JSON scalars, at least one")
    kinds = list(dict.fromkeys(_NAMES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(args: tuple[Any, ...], where: str) -> Schema:
    made = [_schema(arg, where) for arg in args if arg is not type(None)]
    if len(made) == 1:
        schema = made[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in made):
        kinds = sorted({part["type"] for part in made})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": made}
    return schema | ({"nullable": True} if type(None) in args else {})

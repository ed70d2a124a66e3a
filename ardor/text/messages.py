"""Conversations as data: checked, made plain, and which of their answers are trained on."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ardor.errors import TextError

Messages = Sequence[Any]
"""Dicts with a `role` and a `content`. Checked here, as they come from people's files."""

TrainOn = Literal["all", "last"]

# A message's own word on whether it is trained on, over `TrainOn`. `weight` is OpenAI's name.
FLAGS = ("train", "training", "weight")

# The names under which a thought comes beside its answer. Templates read the first, gpt-oss's the
# second. Source: transformers 5.24, which fills in the same two.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def checked(messages: Messages) -> list[dict[str, Any]]:
    """Copies of the messages out of plain JSON values, without the keys whose value is None.

    A message has a `role`, and a `content` that is a string or a list of text parts; an assistant's
    content may be null or missing where it has `tool_calls`. A thought under another name is there
    as `reasoning_content` too.

    Raises: TextError that names the first message that is not so.
    """
    copies = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {len(messages)}"
        found = plain(message, where)
        if not isinstance(found, dict):
            raise TextError(
                f"{where} is {type(message).__name__}; expected an object with 'role' and 'content'"
            )
        _check(found, where)
        copy = {key: value for key, value in found.items() if value is not None}
        thought = next((copy[key] for key in THOUGHTS if key in copy), None)
        if thought is not None:
            copy = {"thinking": thought, **copy, "reasoning_content": thought}
        copies.append(copy)
    return copies


def _check(message: dict[str, Any], where: str) -> None:
    content, calls = message.get("content"), message.get("tool_calls")
    for key in ("role", "content"):
        if key not in message and (key == "role" or not calls):
            keys = ", ".join(map(str, message)) or "nothing"
            raise TextError(f"{where} has no {key!r} (it has {keys}); add it")
    if not isinstance(message["role"], str) or not message["role"]:
        found = "empty" if message["role"] == "" else _kind(message["role"])
        raise TextError(f"{where}: 'role' is {found}; expected a string such as 'user'")
    if calls is not None and not isinstance(calls, list):
        raise TextError(f"{where}: 'tool_calls' is {_kind(calls)}; expected a list of calls")
    for call in calls or ():
        if not isinstance(call, dict) or not isinstance(call_name(call), str):
            raise TextError(
                f"{where}: a tool call is {shown(call)}; expected an object as in "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
            )
    for key in THOUGHTS:
        if message.get(key) is not None and not isinstance(message[key], str):
            raise TextError(f"{where}: {key!r} is {_kind(message[key])}; expected a string")
    if isinstance(content, list):
        for part in content:
            _check_part(part, where)
    elif not isinstance(content, str) and not (content is None and calls):
        raise TextError(
            f"{where}: 'content' is {_kind(content)}; expected a string, or a list of "
            'parts as in {"type": "text", "text": ...}'
        )


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, dict) or "type" not in part:
        raise TextError(
            f"{where}: a part of the content is {shown(part)}; expected an object as in "
            '{"type": "text", "text": ...}'
        )
    if part["type"] != "text":
        raise TextError(
            f"{where}: a part of the content is of type {part['type']!r}; only text can be read, "
            "so leave it out"
        )
    if not isinstance(part.get("text"), str):
        raise TextError(f"{where}: a text part holds {_kind(part.get('text'))} as its 'text'")


def plain(value: Any, where: str) -> Any:
    """The same value out of dicts, lists and JSON's scalars: a template sees nothing else.

    Raises: TextError for anything that JSON does not have.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of a subclass, such as an enumeration
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {key: plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {name: plain(getattr(value, name), where) for name in names}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic, as of OpenAI's client
        return plain(dump(), where)
    if callable(item := getattr(value, "item", None)):  # NumPy's scalars
        return plain(item(), where)
    raise TextError(
        f"{where} holds a {type(value).__name__}, which is not text; give strings, numbers, lists "
        "and objects only"
    )


def trained_turns(messages: list[dict[str, Any]], train_on: TrainOn, given: int = 0) -> list[int]:
    """Which messages are trained on: answers after the first `given` messages.

    "all" of them, or the "last". A message that says `train` (or `training`, or OpenAI's `weight`:
    0 or 1) is taken at its word.

    Raises: TextError if a word is no yes or no, two differ, or one asks for what is no answer.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in answers if i >= given]
    chosen = set(answers if train_on == "all" else answers[-1:])
    for i, message in enumerate(messages):
        where = f"message {i + 1} of {len(messages)}"
        said = {key: _flag(message[key], key, where) for key in FLAGS if key in message}
        if len(set(said.values())) > 1:
            raise TextError(f"{where}: {' and '.join(said)} contradict each other; keep one")
        if True in said.values() and message["role"] != "assistant":
            raise TextError(
                f"{where} is from {message['role']!r} and marked to be trained on; only the "
                "assistant's messages can be, so unmark it"
            )
        if i >= given and said:
            (chosen.add if True in said.values() else chosen.discard)(i)
    return sorted(chosen)


def _flag(value: Any, key: str, where: str) -> bool:
    if value not in (0, 1):  # True == 1, and 1.0 as well
        raise TextError(f"{where}: {key!r} is {shown(value)}; expected true or false, or 1 or 0")
    return bool(value)


def text_of(message: dict[str, Any]) -> str:
    """The content as one string; "" where there is none."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def call_name(call: dict[str, Any]) -> Any:
    """The name of the function that a tool call calls, in either of the two shapes in use."""
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else call.get("name")


def with_arguments(message: dict[str, Any], kind: type) -> dict[str, Any]:
    """The message with each call's arguments as `kind`: a dict, or a str of JSON."""
    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [_call(call, kind) for call in message["tool_calls"]]}


def _call(call: dict[str, Any], kind: type) -> dict[str, Any]:
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _call(function, kind)}
    arguments = call.get("arguments")
    if kind is str and isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if kind is dict and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:
            return call
        return call | {"arguments": read} if isinstance(read, dict) else call
    return call


def shown(value: Any) -> str:
    """A value in an error message: short."""
    return f"{value!r:.60}"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__

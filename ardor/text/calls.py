"""Tools that people describe in a file, and the calls in what a model wrote."""

import json
import re
from pathlib import Path
from typing import Any

from ardor.errors import TextError
from ardor.files.json import parse_json, read_text
from ardor.text.messages import call_name, shown

# Hermes and Qwen write each call between tags.
_TAGGED = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
# Mistral's token, where it is shown, and Llama 3.1's before a call are no part of the JSON.
_OPENING = re.compile(r"^\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")


def read_tools(path: Path) -> list[dict[str, Any]]:
    """A JSON list of functions, as transformers' `apply_chat_template` takes: each
    {"type": "function", "function": {"name", "description", "parameters"}}, or the inner part.

    Raises: TextError or CheckpointError if the file is not there or is something else.
    """
    if not path.is_file():
        raise TextError(f"{path} is no file; give a JSON file with a list of functions")
    found = parse_json(read_text(path), path)
    if not isinstance(found, list) or not found:
        held = "an empty list" if found == [] else f"a JSON {type(found).__name__}"
        raise TextError(f"{path} holds {held}; expected a list of functions")
    tools = []
    for number, tool in enumerate(found, 1):
        name = call_name(tool) if isinstance(tool, dict) else None
        if not isinstance(name, str) or not name:
            raise TextError(
                f"{path}: entry {number} of {len(found)} is {shown(tool)}; expected an object as "
                'in {"type": "function", "function": {"name": ..., "description": ..., '
                '"parameters": {...}}}'
            )
        inner = tool if "function" in tool else {"type": "function", "function": tool}
        tools.append(inner)
    return tools


def read_calls(text: str, first: int = 1) -> tuple[str, list[dict[str, Any]]]:
    """What of an answer is said, and its calls as a message's `tool_calls`, each with an id: its
    own, or one made of its number, from `first` on.

    Calls are read in the form of Hermes and Qwen (between <tool_call> tags), of Llama 3.1 (one JSON
    object) and of Mistral (a JSON list). What looks like none of them is all said.
    """
    if tagged := _TAGGED.findall(text):
        said, calls = _TAGGED.sub("", text).strip(), [_call(_parsed(body)) for body in tagged]
    else:
        whole = _parsed(_OPENING.sub("", text, count=1))
        said, calls = "", [_call(one) for one in (whole if isinstance(whole, list) else [whole])]
    if not calls or None in calls:
        return text, []
    # Mistral's templates want nine letters and digits.
    made = [
        {"id": f"call{i:05d}", **call} for i, call in enumerate(calls, first) if call is not None
    ]
    return said, made


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _call(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or not isinstance(name := found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    own = {"id": found["id"]} if isinstance(found.get("id"), str) else {}
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **own}

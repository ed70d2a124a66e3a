"""Which ids are special, which are control, and a tokenizer that cannot produce the control ones.

A control token is any added token that is not mere white space, whether its file calls it "special"
or not (DeepSeek's `<｜User｜>` is not). White-space tokens (GPT-NeoX, Phi) are text; so is a word
that is not special. A tag is a control token that the file calls not special and that looks like
one, as Qwen's `<think>` and `<tool_call>`: a model writes it as part of its answer, so it is a
token there and nowhere else.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken

from ardor.errors import TextError
from ardor.files.json import read_json

KINDS = ("bos", "eos", "unk", "pad")

_TAG = re.compile(r"</?[A-Za-z][\w-]*/?>")

# Where a text stands decides whether a tokenizer puts a space before it: at the very start of the
# input, after a control token, or in the middle of running text.
Place = Literal["start", "segment", "middle"]


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that play a part, or None where the tokenizer has no such token."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None


def is_control(token: AddedToken) -> bool:
    """Is this added token special, or more than words and white space (typed, or SentencePiece's)?

    An added word, such as a term that fine-tuning gives a token of its own, is text.
    """
    return token.special or re.fullmatch(r"[\w\s'-]*", token.content.replace("▁", " ")) is None


def is_tag(token: AddedToken) -> bool:
    """Is this a token that a model writes inside its answers, such as `<think>`?"""
    return not token.special and _TAG.fullmatch(token.content) is not None


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {} where there is none.

    Raises: CheckpointError for invalid JSON; TextError if it is not an object.
    """
    return _read_object(directory / "tokenizer_config.json")


def read_names(directory: Path) -> dict[str, str]:
    """The special tokens' texts by name: {"bos_token": "<s>", ...}; absent ones are left out.

    special_tokens_map.json counts only where tokenizer_config.json has no `added_tokens_decoder`,
    and then it wins, as in transformers.

    Raises: CheckpointError for invalid JSON; TextError for a value that is no token.
    """
    config = read_config(directory)
    names = _names(config, directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        legacy = directory / "special_tokens_map.json"
        names |= _names(_read_object(legacy), legacy)
    return names


def read_extra(directory: Path) -> list[str]:
    """Further special tokens that the files name: `extra_special_tokens` in transformers 5 (a list,
    or named ones), `additional_special_tokens` before.

    Raises: CheckpointError for invalid JSON; TextError for a value that is no list of tokens.
    """
    config, path = read_config(directory), directory / "tokenizer_config.json"
    sources = [(config, path)]
    if "added_tokens_decoder" not in config:
        path = directory / "special_tokens_map.json"
        sources.append((_read_object(path), path))
    found: list[str] = []
    for source, path in sources:
        key = "extra_special_tokens" if "extra_special_tokens" in source else None
        key = key or "additional_special_tokens"
        value = source.get(key) or ()
        for token in value.values() if isinstance(value, dict) else value:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise TextError(
                    f"{path}: {key} holds {token!r}; expected strings, or objects with 'content'"
                )
            found.append(text)
    return list(dict.fromkeys(found))


def read_added(directory: Path) -> dict[int, AddedToken]:
    """Added tokens that the files beside tokenizer.json declare, by id.

    Raises: CheckpointError for invalid JSON.
    """
    if "added_tokens_decoder" not in read_config(directory):
        special = {*read_names(directory).values(), *read_extra(directory)}
        return {
            id: AddedToken(content, normalized=content not in special, special=content in special)
            for content, id in _read_object(directory / "added_tokens.json").items()
        }
    found = {}
    for id, token in read_config(directory).get("added_tokens_decoder", {}).items():
        flags = {name: token.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
        flags |= {name: token.get(name, False) for name in ("normalized", "special")}
        found[int(id)] = AddedToken(token["content"], **flags)
    return found


def without_control(
    tokenizer: dict[str, Any], control: Collection[int], keep: int | None, place: Place
) -> dict[str, Any]:
    """The content of tokenizer.json, changed so that no text encodes to an id in `control`.

    No added tokens, no post-processor; the model forgets `control` (but not `keep`, the unknown
    token), with the merges that would build them. In the "middle" of a text no space is put in
    front; after a control token ("segment") only where the tokenizer does so everywhere.
    """
    forgotten = set(control) - {keep}
    return tokenizer | {
        "added_tokens": [],
        "post_processor": None,
        "normalizer": _at(tokenizer["normalizer"], place),
        "pre_tokenizer": _at(tokenizer["pre_tokenizer"], place),
        "model": _forget(tokenizer["model"], forgotten),
    }


def _forget(model: dict[str, Any], ids: Collection[int]) -> dict[str, Any]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: the place in the list is the id, so the entry must stay
        # Noncharacters: Unicode forbids them in text that is exchanged.
        renamed = [
            [f"\ufdd0{id}\ufdd1", entry[1]] if id in ids else entry
            for id, entry in enumerate(vocab)
        ]
        return model | {"vocab": renamed}
    gone = {token for token, id in vocab.items() if id in ids}
    if not gone:
        return model
    kept = model | {"vocab": {token: id for token, id in vocab.items() if token not in gone}}
    if "merges" in model:
        kept["merges"] = [merge for merge in model["merges"] if not _builds(merge, gone)]
    return kept


def _builds(merge: Any, gone: Collection[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in gone or right in gone or left + right in gone


def _at(step: Any, place: Place) -> Any:
    """A normalizer or pre-tokenizer that puts a space in front only where `place` calls for it."""
    if step is None or place == "start":
        return step
    match step["type"]:
        case "Sequence":
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            inner = [_at(part, place) for part in step[key]]
            return step | {key: [part for part in inner if part is not None]}
        case "Metaspace" if place == "middle" or step.get("prepend_scheme") == "first":
            return step | {"prepend_scheme": "never"}
        case "ByteLevel" if place == "middle":
            return step | {"add_prefix_space": False}
        case "Prepend" if place == "middle":
            return None
        case "Replace" if place != "start" and step["content"] == "▁▁":
            return None  # SentencePiece's second space at the start of a text
    return step


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise TextError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _names(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    names = {}
    for name in (f"{kind}_token" for kind in KINDS):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise TextError(
                f"{path}: {name} is {value!r}; expected a string or an object with 'content'"
            )
        names[name] = text
    return names

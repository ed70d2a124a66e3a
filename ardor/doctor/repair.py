"""A copy of a checkpoint in which what has a mechanical repair is repaired.

Weights that do not change are linked where the disk allows it; the original is never written to.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from ardor.doctor.checkpoint import TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from ardor.doctor.ids import ids_of, written_by_template
from ardor.doctor.rules.files import tied_keys
from ardor.doctor.rules.tokens import BANS, SPECIAL_MAP, idle_settings, puts_after
from ardor.doctor.rules.vocabulary import KINDS, untrained_rows
from ardor.doctor.rules.weights import stored_dtype
from ardor.doctor.tables import mean_rows, tables
from ardor.errors import ConfigError
from ardor.files.atomic import atomic_directory, write_atomic
from ardor.files.json import read_object, write_json
from ardor.files.stream import write_shard
from ardor.files.weights import PICKLED, write_weights
from ardor.load import CONFIG, GENERATION
from ardor.text.special import KINDS as NAMES
from ardor.text.special import read_names

JINJA = "chat_template.jinja"
WEIGHTS = (".safetensors", ".bin")  # what is linked
# Tokens that a vocabulary has to spare, the best first.
SPARE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"<\|?pad\|?>|\[pad\]",
        r"<\|finetune_right_pad(_id)?\|>",
        r".*(reserved|unused|dummy).*",
    )
)
END_OF_LAST = (
    "{{%- if not add_generation_prompt and messages and messages[-1]['role'] == 'assistant' -%}}"
    "{{{{ {end!r} }}}}{{%- endif -%}}"
)


class Copy:
    """What will be different in the copy: files by name, and tensors."""

    def __init__(self, it: Checkpoint) -> None:
        self.it = it
        self.changed: dict[str, dict[str, Any]] = {}  # JSON files
        self.template: str | None = None
        self.tensors: dict[str, Tensor] = {}
        self.unpickled = False

    def json(self, name: str) -> dict[str, Any]:
        """The file's content, to be changed in place; {} for a file that is new.

        A tokenizer that was read from other files gets a tokenizer.json, which goes before them.
        """
        if name == TOKENIZER:
            return self.changed.setdefault(name, deepcopy(self.it.tokenizer_json))
        if name not in self.changed:
            home = self.it.text_path if name.startswith(("token", "special")) else self.it.path
            path = (home or self.it.path) / name
            self.changed[name] = deepcopy(read_object(path)) if path.exists() else {}
        return self.changed[name]

    def holders(self) -> Iterator[dict[str, Any]]:
        """The files that name ids of special tokens."""
        if not self.it.adapter:
            yield self.json(CONFIG)
        yield self.json(GENERATION)

    def write(self, directory: Path) -> None:
        """Fill an empty directory."""
        it = self.it
        replaced = self._replaced_shards()
        for file in sorted(it.path.iterdir()):
            left = self.unpickled and (file.name in PICKLED or file.suffix == ".bin")
            if file.name.startswith(".") or left or file.name in replaced:
                continue
            if file.is_dir():
                shutil.copytree(file, directory / file.name)
            elif file.suffix in WEIGHTS:
                _link(file, directory / file.name)
            else:
                shutil.copy(file, directory / file.name)
        for name, held in replaced.items():
            tensors = {n: self._tensor(n) for n in held}
            write_shard(directory / name, tensors, iter(tensors.items()))
        if self.unpickled and it.files is not None:
            files = it.files
            write_weights(directory, {n: files.read(n).clone() for n in files.names()})
        for name, value in self.changed.items():
            if value:
                write_json(directory / name, value)
        if self.template is not None:
            write_atomic(directory / JINJA, self.template)

    def _replaced_shards(self) -> dict[str, list[str]]:
        files = self.it.files
        if files is None or not self.tensors:
            return {}
        names = {files.file(name).name for name in self.tensors}
        return {shard: [n for n in files.names() if files.file(n).name == shard] for shard in names}

    def _tensor(self, name: str) -> Tensor:
        assert self.it.files is not None
        return self.tensors[name] if name in self.tensors else self.it.files.read(name)


def repair(it: Checkpoint, rules: set[str], output: Path) -> tuple[str, ...]:
    """Write a repaired copy of `it` to `output`, whole or not at all; the rules that were repaired.

    Raises: ConfigError if `output` holds something; CheckpointError if it cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something already; give a new or an empty directory")
    copy, done = Copy(it), []
    for rule, mend in REPAIRS.items():
        if rule in rules and mend(it, copy):
            done.append(rule)
    with atomic_directory(output) as partial:
        copy.write(partial)
    return tuple(done)


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # the hub's cache holds links
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy(source, target)


# Each gives whether it could do anything.


def _special_ids(it: Checkpoint, copy: Copy) -> bool:
    assert it.rows is not None
    for held in copy.holders():
        for key in KINDS:
            ids = ids_of(held.get(key))
            valid = [id for id in ids if 0 <= id < it.rows]
            if valid != ids:
                held[key] = _ends(it) if key == "eos_token_id" else next(iter(valid), None)
    return True


def _ends(it: Checkpoint) -> int | list[int] | None:
    """Every end of the files that is a token of the model, as config files hold them."""
    assert it.tokenizer is not None
    ids = ids_of(it.stops.eos_token_id)
    known = [id for id in ids if it.tokenizer.token(id) is not None and id < (it.rows or id + 1)]
    return known if len(known) > 1 else next(iter(known), None)


def _eos(it: Checkpoint, copy: Copy) -> bool:
    for held in copy.holders():
        held["eos_token_id"] = _ends(it)
        inner = held.get("text_config")
        if isinstance(inner, dict) and "eos_token_id" in inner:
            inner["eos_token_id"] = _ends(it)
    return True


def _begin_and_pad(it: Checkpoint, copy: Copy) -> bool:
    assert it.tokenizer is not None
    for kind in ("bos", "pad"):
        id = getattr(it.tokenizer.special, kind)
        for held in copy.holders():
            held_id = (it.generation or {}).get(f"{kind}_token_id") if id is None else id
            if held.get(f"{kind}_token_id") is not None and held_id is not None:
                held[f"{kind}_token_id"] = held_id
    return True


def _pad(it: Checkpoint, copy: Copy) -> bool:
    """A token of its own, among those that the vocabulary has and nothing uses."""
    tokenizer = it.tokenizer
    assert tokenizer is not None
    taken = it.stops.ids | written_by_template(tokenizer, it.template)
    taken |= {id for id in (tokenizer.special.bos, tokenizer.special.unk) if id is not None}
    free = {
        text: id
        for text, id in tokenizer.added.items()
        if id not in taken and (it.rows is None or id < it.rows)
    }
    chosen = next((text for p in SPARE for text in free if p.fullmatch(text)), None)
    if chosen is None:
        return False
    copy.json(TOKENIZER_CONFIG)["pad_token"] = chosen
    if it.text_path is not None and (it.text_path / SPECIAL_MAP).exists():
        copy.json(SPECIAL_MAP)["pad_token"] = chosen
    for held in copy.holders():
        held["pad_token_id"] = free[chosen]
    return True


def _stop_banned(it: Checkpoint, copy: Copy) -> bool:
    held = copy.json(GENERATION)
    for key in BANS:
        if isinstance(held.get(key), list):
            held[key] = [
                one
                for one in held[key]
                if len(ids_of(one)) != 1 or ids_of(one)[0] not in it.stops.ids
            ]
    for key in ("min_length", "min_new_tokens"):
        held.pop(key, None)
    return True


def _token_files(it: Checkpoint, copy: Copy) -> bool:
    assert it.text_path is not None
    for kind, text in read_names(it.text_path).items():
        if kind in [f"{name}_token" for name in NAMES]:
            copy.json(SPECIAL_MAP)[kind] = copy.json(TOKENIZER_CONFIG)[kind] = text
    return True


def _start_flags(it: Checkpoint, copy: Copy) -> bool:
    """Nothing after a text, and flags that say what is so."""
    assert it.tokenizer is not None
    flags, held = copy.json(TOKENIZER_CONFIG), copy.json(TOKENIZER)
    for step in puts_after(held):
        for key in ("single", "pair"):
            while step.get(key) and "SpecialToken" in step[key][-1]:
                step[key].pop()
    for key, does in (("add_bos_token", bool(it.tokenizer.prefix)), ("add_eos_token", False)):
        if key in flags:
            flags[key] = does
    return True


def _padding_block(_: Checkpoint, copy: Copy) -> bool:
    copy.json(TOKENIZER).update(truncation=None, padding=None)
    return True


def _token_flags(it: Checkpoint, copy: Copy) -> bool:
    for token in copy.json(TOKENIZER)["added_tokens"]:
        if token["id"] in it.stops.ids:
            token.update(special=True, single_word=False)
    return True


def _length_limit(it: Checkpoint, copy: Copy) -> bool:
    config = it.config or {}
    most = config.get("max_position_embeddings") or config.get("n_positions")
    copy.json(TOKENIZER_CONFIG)["model_max_length"] = most
    return True


def _generation_settings(_: Checkpoint, copy: Copy) -> bool:
    held = copy.json(GENERATION)
    for key in idle_settings(held):
        del held[key]
    return True


def _template_copies(it: Checkpoint, copy: Copy) -> bool:
    held = copy.json(TOKENIZER_CONFIG)
    if it.template is None or not isinstance(held.get("chat_template"), str):
        return False
    held["chat_template"] = it.template.source
    return True


def _template_end(it: Checkpoint, copy: Copy) -> bool:
    assert it.tokenizer is not None and it.template is not None
    end = it.terminator if it.terminator is not None else it.tokenizer.special.eos
    if end is None:
        return False
    copy.template = it.template.source + END_OF_LAST.format(end=it.tokenizer.token(end))
    if isinstance(it.tokenizer_config.get("chat_template"), str):
        copy.json(TOKENIZER_CONFIG)["chat_template"] = copy.template
    return True


def _untrained(it: Checkpoint, copy: Copy) -> bool:
    for name, matrix in tables(it):
        ids = sorted(untrained_rows(it, matrix))
        if ids:
            mended = matrix.clone()
            mended[ids] = mean_rows(matrix, ids).to(matrix.dtype)
            copy.tensors[name] = mended
    return bool(copy.tensors)


def _pickles(it: Checkpoint, copy: Copy) -> bool:
    """Only where they were read, which takes --no-use-safetensors."""
    copy.unpickled = it.files is not None
    return copy.unpickled


def _dtype(it: Checkpoint, copy: Copy) -> bool:
    config = copy.json(CONFIG)
    for key in ("dtype", "torch_dtype"):
        if config.get(key):
            config[key] = stored_dtype(it)
    return True


def _untie(_: Checkpoint, copy: Copy) -> bool:
    for holder, key in tied_keys(copy.json(CONFIG)):
        holder[key] = False
    return True


# By rule, in the order in which they are made: a later one may build on an earlier.
REPAIRS: dict[str, Callable[[Checkpoint, Copy], bool]] = {
    "pickle-only": _pickles,
    "config-dtype": _dtype,
    "tied-head": _untie,
    "special-ids": _special_ids,
    "begin-and-pad": _begin_and_pad,
    "ends": _eos,
    "stop-token": _eos,
    "stop-reachable": _eos,
    "stop-banned": _stop_banned,
    "token-files": _token_files,
    "pad-is-unknown": _pad,
    "pad-in-stops": _pad,
    "start-flags": _start_flags,
    "padding-block": _padding_block,
    "token-flags": _token_flags,
    "length-limit": _length_limit,
    "generation-settings": _generation_settings,
    "template-copies": _template_copies,
    "template-end": _template_end,
    "untrained-tokens": _untrained,
}

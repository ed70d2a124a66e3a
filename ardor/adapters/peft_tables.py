"""What PEFT writes of the tables of tokens: of a resized base, and of a head that is tied.

A base whose vocabulary was resized before it was trained on lies on no disk as it was then, so PEFT
saves its tables in full beside the adapter. The rows in which they differ from those of the base
here become rows that are trained one by one, which computes the same.

Axes: V rows of a table, D its width.
Source: PEFT 0.21, utils/save_and_load.py, get_peft_model_state_dict.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ardor.adapters.config import TOKEN_OWNERS, ends_with
from ardor.adapters.lora import is_tied
from ardor.adapters.peft_layout import PREFIX, TOKENS, DiskLinear
from ardor.errors import CheckpointError

_BASE = ".token_adapter.base_layer.weight"
_HEAD = f"{PREFIX}lm_head"


def saved_rows(weights: Path, tables: Iterable[str]) -> int:
    """The rows of the largest of these tables (by their names on disk) in a file; 0 without any."""
    rows = 0
    try:
        with safe_open(weights, "pt") as file:
            held = {*file.keys()}
            for table in tables:
                for leaf, axis in ((".weight", 0), (_BASE, 0), (".lora_embedding_A", 1)):
                    if (key := f"{PREFIX}{table}{leaf}") in held:
                        rows = max(rows, file.get_slice(key).get_shape()[axis])
    except (OSError, SafetensorError):
        return 0  # what is wrong with the file is said when its tensors are read
    return rows


def settle_tables(
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    decoder: nn.Module,
    disk_names: Mapping[str, DiskLinear],
    config: Path,
) -> None:
    """Change a config and its tensors into what PEFT would write for the base as it is.

    Raises: CheckpointError for tables with more rows than the model's, for an embedding that is
        adapted and was resized or has magnitudes, and for a tied head trained by itself.
    """
    places = {
        name: disk_names[name].name
        for name in TOKEN_OWNERS
        if name in disk_names and hasattr(decoder, name)
    }
    for key in {_HEAD, *(f"{PREFIX}{disk}" for disk in places.values())}:
        for part in ("modules_to_save", "original_module"):
            for leaf in ("weight", "bias"):
                tensors.pop(f"{key}.{part}.{leaf}", None)  # the copy once more, and what it hides
    indices = _indices(raw, places)
    if is_tied(decoder):
        _untwin(raw, tensors, indices, places.get("embed_tokens", "embed_tokens"), config)
    for name, disk in places.items():
        key = f"{PREFIX}{disk}"
        if f"{key}.lora_embedding_A" in tensors:
            _check_embedding(tensors, key, _table(decoder, name, config), config)
        elif any(ends_with(disk, entry) for entry in raw.get("modules_to_save") or ()):
            _fill_up(tensors, key, decoder, name, config)
        else:
            _take_rows(tensors, indices, name, disk, decoder, config)
    if indices:
        raw["trainable_token_indices"] = {places.get(n, n): ids for n, ids in indices.items()}


def _indices(raw: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, list[int]]:
    """The ids of each table, by our names of those that this model has."""
    asked = raw.get("trainable_token_indices") or {}
    if not isinstance(asked, dict):
        return {"embed_tokens": [*asked]} if asked else {}
    ours = {disk: name for name, disk in places.items()}
    return {
        next((name for disk, name in ours.items() if ends_with(disk, target)), target): [*ids]
        for target, ids in asked.items()
    }


def _untwin(
    raw: Mapping[str, Any],
    tensors: dict[str, Tensor],
    indices: dict[str, list[int]],
    embedding: str,
    config: Path,
) -> None:
    """Take away what is written of a tied head too.

    Raises: CheckpointError if it is not what is written of the embedding.
    """
    own = f"{PREFIX}{embedding}"
    apart = False
    if "lm_head" in indices:
        apart = indices.pop("lm_head") != indices.get("embed_tokens")
    for leaf in (".weight", _BASE, TOKENS):
        first, second = tensors.get(f"{own}{leaf}"), tensors.get(f"{_HEAD}{leaf}")
        if first is not None and second is not None and torch.equal(first, second):
            del tensors[f"{_HEAD}{leaf}"]
    if not raw.get("ensure_weight_tying"):
        whole = any(ends_with(embedding, entry) for entry in raw.get("modules_to_save") or ())
        apart |= whole or f"{own}.lora_embedding_A" in tensors
        apart |= any(key.startswith(f"{_HEAD}.") for key in tensors)
    if apart:
        raise CheckpointError(
            f"{config}: this model's head is its embedding, and the adapter trained one of them "
            "apart from the other; train it again on embed_tokens with ensure_weight_tying=True, "
            "or merge it with peft on an untied copy of the base"
        )


def _check_embedding(
    tensors: dict[str, Tensor], key: str, base: Float[Tensor, "V D"], config: Path
) -> None:
    if f"{key}.lora_magnitude_vector" in tensors:
        raise CheckpointError(
            f"{config}: use_dora of the embedding is not supported, as DoRA is for linear maps; "
            "merge the adapter into its base with peft and load the merged model"
        )
    table = tensors.pop(f"{key}.base_layer.weight", None)  # the base's, which PEFT saves again
    if table is not None and (table.shape != base.shape or _differ(table, base)):
        raise CheckpointError(
            f"{config}: it adapts an embedding of {len(table)} rows that is not the base's of "
            f"{len(base)}: it was resized or trained before it was adapted, and no file has the "
            "whole of it; merge the adapter with peft where it was trained, and load the result"
        )


def _fill_up(
    tensors: dict[str, Tensor], key: str, decoder: nn.Module, name: str, config: Path
) -> None:
    """Give a copy of a table that was cut to its tokenizer the base's other rows, never read."""
    copy = tensors.get(f"{key}.weight")
    if copy is None or len(copy) >= len(base := _table(decoder, name, config)):
        return
    if copy.shape[1:] == base.shape[1:]:
        tensors[f"{key}.weight"] = torch.cat([copy, base[len(copy) :].to(copy)])


def _take_rows(
    tensors: dict[str, Tensor],
    indices: dict[str, list[int]],
    name: str,
    disk: str,
    decoder: nn.Module,
    config: Path,
) -> None:
    key = f"{PREFIX}{disk}"
    held = [leaf for leaf in (f"{key}{_BASE}", f"{key}.weight") if leaf in tensors]
    if not held:
        return
    table, base = tensors[held[0]], _table(decoder, name, config)
    if table.shape[1:] != base.shape[1:]:
        return  # of another base: what has no place is then named
    if len(table) > len(base):
        raise CheckpointError(
            f"{config.parent} has a table of {len(table)} rows for {disk}, and the model as it is "
            f"loaded {len(base)}; load this adapter as the model, and others beside it"
        )
    for leaf in held:
        del tensors[leaf]
    known = indices.get(name, [])
    more = [row for row in _differ(table, base[: len(table)]) if row not in {*known}]
    if more:
        trained = [tensors[f"{key}{TOKENS}"].float()] if known else []
        tensors[f"{key}{TOKENS}"] = torch.cat([*trained, table[more].float()])
        indices[name] = [*known, *more]


def _differ(table: Float[Tensor, "V D"], base: Float[Tensor, "V D"]) -> list[int]:
    """The rows that are not equal in the coarser of their dtypes."""
    base = base.to(table.device)
    equal = (table.to(base.dtype) == base).all(1) | (table == base.to(table.dtype)).all(1)
    return (~equal).nonzero().flatten().tolist()


def _table(decoder: nn.Module, name: str, config: Path) -> Float[Tensor, "V D"]:
    """The rows of the base, under whatever adapts them."""
    module = decoder.get_submodule(name)
    for inner in ("tokens", "base"):
        module = getattr(module, inner, module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise CheckpointError(
            f"{config.parent} has rows of {name}, which is held as {type(module).__name__} here; "
            "load the base without quantization"
        )
    return weight.detach()

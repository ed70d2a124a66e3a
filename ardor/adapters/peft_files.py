"""PEFT's files: adapter_config.json and adapter_model.safetensors, written and read.

A file names the modules that transformers builds. Where one of its linears holds several of ours
(GPT-2's c_attn is q, k and v), its adapter is split or joined so that both compute the same:

    PEFT:  y = B A x        B (3D, R)        ours:  q = B_q A_q x,  k = B_k A_k x,  v = B_v A_v x

Source: peft 0.21, utils/save_and_load.py and tuners/lora/model.py.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ardor.adapters.lora import (
    ALL_LINEAR,
    LoraConfig,
    LoraLinear,
    TrainableHead,
    TrainableTokens,
    add_token_rows,
    ends_with,
    linear_names,
    lora_modules,
    replace,
    size_of,
)
from ardor.errors import CheckpointError, ConfigError
from ardor.files.atomic import write_atomic
from ardor.files.json import read_object, write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"

# Keys of adapter_config.json that are read here.
_READ = {
    *("peft_type", "bias", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "trainable_token_indices"),
    *("rank_pattern", "alpha_pattern"),
}
# Keys that change nothing about an adapter that has been trained.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config"),
    *("ensure_weight_tying", "eva_config", "runtime_config"),
}
# Ways to start that leave the base weights as they are; others (PiSSA, OLoRA, ...) change them.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@runtime_checkable
class DiskLinear(Protocol):
    """Where transformers has a linear of ours."""

    @property
    def name(self) -> str: ...  # of the module, such as "transformer.h.0.attn.c_attn"
    @property
    def part(self) -> int: ...  # which of its `parts` blocks of outputs
    @property
    def parts(self) -> int: ...
    @property
    def transposed(self) -> bool: ...  # Conv1D: PEFT calls it fan_in_fan_out
    @property
    def groups(self) -> int: ...  # the blocks follow each other so many times over: one per head


@dataclass(frozen=True)
class _Group:
    """A linear on disk and the linears of ours in it, by part."""

    disk: str
    names: tuple[str, ...]
    inputs: int
    sizes: tuple[int, ...]  # outputs of each part
    transposed: bool
    groups: int

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """The indices of each part's outputs among those of the linear on disk."""
        grouped = torch.arange(sum(self.sizes)).unflatten(0, (self.groups, -1))
        parts = grouped.split([size // self.groups for size in self.sizes], 1)
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.flatten()


@dataclass(frozen=True)
class _Adapter:
    """One adapter as it is on disk."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    alpha: int | float


def save_adapter(
    directory: str | Path,
    decoder: nn.Module,
    config: LoraConfig,
    *,
    disk_names: Mapping[str, DiskLinear],
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write the adapter of `decoder` so that PEFT and `load_adapter` compute the same with it.

    Linears that share a disk linear are joined: one A if their A are equal, else a block-diagonal
    adapter whose rank is the sum of theirs, with the same scale. Each file appears whole or not at
    all, the weights first; other files of the directory stay.

    Raises: ConfigError if there is nothing to save, or `disk_names` lacks a module.
    """
    adapted = dict(lora_modules(decoder))
    groups = _groups(decoder, disk_names)
    joined = {
        group.disk: _join(group, adapted, config.use_rslora)
        for group in groups
        if any(name in adapted for name in group.names)
    }
    rows = dict(_token_modules(decoder))
    if not joined and not rows:
        raise ConfigError("this model has no adapter to save; save the model instead")
    if lost := adapted.keys() - {name for group in groups for name in group.names}:
        raise ConfigError(f"no name on disk is known for the adapted {sorted(lost)}")
    tensors = {}
    for disk, adapter in joined.items():
        tensors[f"{_PREFIX}{disk}.lora_A.weight"] = adapter.a
        tensors[f"{_PREFIX}{disk}.lora_B.weight"] = adapter.b
    for name, tokens in rows.items():
        key = f"{_PREFIX}{_disk(disk_names, name)}{_TOKENS}"
        tensors[key] = tokens.trainable_tokens_delta
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    known = list(dict.fromkeys(place.name for place in disk_names.values()))
    written = _config(config, joined, known, any(g.transposed for g in groups))
    written |= {"base_model_name_or_path": base_model, "revision": revision}
    written["trainable_token_indices"] = _token_indices(rows, disk_names)
    write_atomic(Path(directory) / ADAPTER_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(Path(directory) / ADAPTER_CONFIG, written)


def load_adapter(
    directory: str | Path, decoder: nn.Module, *, disk_names: Mapping[str, DiskLinear]
) -> LoraConfig:
    """Put the adapter of a PEFT directory on `decoder`; what it says about itself.

    On a decoder without an adapter the targets are wrapped, everything else is frozen, and the
    adapter can be trained. On one that has it already (to resume) its tensors are overwritten in
    place, so that an optimizer keeps its parameters.

    Raises: CheckpointError for a file that is missing or damaged, a setting that would change
        results and is not supported, and tensors that are missing, left over or of another shape.
    """
    path = Path(directory) / ADAPTER_CONFIG
    raw = read_object(path)
    _check_settings(raw, path)
    tensors = _read_tensors(Path(directory) / ADAPTER_WEIGHTS)
    groups = _groups(decoder, disk_names)
    present = dict(lora_modules(decoder))
    chosen = _targeted(raw, groups, path)
    adapted = {group for group in groups if any(name in present for name in group.names)}
    if present and adapted != set(chosen):
        differ = sorted(group.disk for group in adapted ^ set(chosen))
        raise CheckpointError(
            f"{path} adapts other modules than this model does: they differ in {_some(differ)}"
        )
    on_disk = {group: _take(group, tensors, raw, path) for group in chosen}
    indices = _read_indices(raw, disk_names, path)
    rows = {name: tensors.pop(_row_key(disk_names, name), None) for name in indices}
    if missing := [name for name, tensor in rows.items() if tensor is None]:
        raise CheckpointError(f"{directory} lacks the trained token rows of {missing}")
    if tensors:
        raise CheckpointError(
            f"{Path(directory) / ADAPTER_WEIGHTS} holds tensors that {ADAPTER_CONFIG} or this "
            f"model gives no place: {_some(tensors)}; check that this is the adapter's base model"
        )
    config = _read_config(raw, chosen, indices)
    if not present:
        decoder.requires_grad_(False)
    for group, adapter in on_disk.items():
        _place(decoder, group, adapter, config, present)
    _place_rows(decoder, indices, rows, path)
    return config


# --- between their linears and ours ---


def _groups(decoder: nn.Module, disk_names: Mapping[str, DiskLinear]) -> list[_Group]:
    """Our linears by the disk linear they belong to, in the order of the decoder."""
    groups: dict[str, dict[int, str]] = {}
    for name in linear_names(decoder):
        if name in disk_names:
            place = disk_names[name]
            groups.setdefault(place.name, {})[place.part] = name
    found = []
    for disk, parts in groups.items():
        names = tuple(parts[part] for part in sorted(parts))
        place = disk_names[names[0]]
        assert len(names) == place.parts, f"{disk} is not whole in {names}"
        sizes = [size_of(decoder.get_submodule(name)) for name in names]
        outputs = tuple(size[1] for size in sizes)
        found.append(_Group(disk, names, sizes[0][0], outputs, place.transposed, place.groups))
    return found


def _join(group: _Group, adapted: Mapping[str, LoraLinear], rslora: bool) -> _Adapter:
    members = [(adapted[name], rows) for name, rows in group.rows() if name in adapted]
    first = members[0][0]
    if len(group.names) == 1:
        return _Adapter(first.lora_A, first.lora_B, first.alpha)
    shared = len(members) == len(group.names) and all(
        module.scale == first.scale and torch.equal(module.lora_A, first.lora_A)
        for module, _ in members
    )
    if shared:
        b = first.lora_B.new_empty(sum(group.sizes), first.r)
        for module, rows in members:
            b[rows] = module.lora_B
        return _Adapter(first.lora_A, b, first.alpha)
    a = torch.cat([module.lora_A for module, _ in members])
    b = a.new_zeros(sum(group.sizes), len(a))
    start = 0
    for module, rows in members:
        # One scale serves the whole group; nothing is multiplied where they are equal already.
        same = module.scale == first.scale
        block = module.lora_B if same else module.lora_B * (module.scale / first.scale)
        b[rows, start : start + module.r] = block
        start += module.r
    return _Adapter(a, b, _alpha(first.alpha, first.r, len(a), rslora))


def _split(
    group: _Group, adapter: _Adapter, members: list[str], rank: int
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """A and B of each member, or None if the parts that are no members are adapted too.

    What `_join` made block-diagonal (its rank says so) comes apart into the same blocks again.
    """
    places = dict(group.rows())
    if any(adapter.b[rows].any() for name, rows in places.items() if name not in members):
        return None
    if len(adapter.a) == rank * len(members):
        blocks = {m: slice(i * rank, (i + 1) * rank) for i, m in enumerate(members)}
        rest = adapter.b.clone()
        for name, columns in blocks.items():
            rest[places[name], columns] = 0
        if not rest.any():
            return {m: (adapter.a[c], adapter.b[places[m], c]) for m, c in blocks.items()}
    return {name: (adapter.a, adapter.b[places[name]]) for name in members}


def _place(
    decoder: nn.Module,
    group: _Group,
    adapter: _Adapter,
    config: LoraConfig,
    present: Mapping[str, LoraLinear],
) -> None:
    members = [name for name in group.names if name in present or not present]
    rank = present[members[0]].r if present else config.r
    split = _split(group, adapter, members, rank)
    if split is None:
        raise CheckpointError(f"the adapter of {group.disk} reaches beyond the adapted {members}")
    for name, (a, b) in split.items():
        alpha = _alpha(adapter.alpha, len(adapter.a), len(a), config.use_rslora)
        if math.isclose(alpha, config.lora_alpha, rel_tol=1e-12):
            alpha = config.lora_alpha  # square roots there and back
        module = present.get(name)
        if module is None:
            module = LoraLinear(
                decoder.get_submodule(name),
                len(a),
                alpha,
                config.lora_dropout,
                rslora=config.use_rslora,
            )
            replace(decoder, name, module)
        if (module.r, module.alpha, module.rslora) != (len(a), alpha, config.use_rslora):
            raise CheckpointError(
                f"the saved adapter of {name} has rank {len(a)} and alpha {alpha:g}, but the "
                f"model's has rank {module.r} and alpha {module.alpha:g}"
            )
        with torch.no_grad():
            module.lora_A.copy_(a)
            module.lora_B.copy_(b)


def _token_modules(decoder: nn.Module) -> Iterator[tuple[str, TrainableTokens]]:
    embedding, head = (getattr(decoder, name, None) for name in ("embed_tokens", "lm_head"))
    if isinstance(embedding, TrainableTokens):
        yield "embed_tokens", embedding
    if isinstance(head, TrainableHead) and head.tokens is not embedding:
        yield "lm_head", head.tokens


def _place_rows(
    decoder: nn.Module,
    indices: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, Tensor | None],
    path: Path,
) -> None:
    present = dict(_token_modules(decoder))
    if not present:
        add_token_rows(decoder, indices)
        present = dict(_token_modules(decoder))
    if {name: tuple(m.token_ids.tolist()) for name, m in present.items()} != dict(indices):
        raise CheckpointError(f"{path} and this model train the rows of different tokens")
    for name, module in present.items():
        trained = rows[name]
        assert trained is not None
        if trained.shape != module.trainable_tokens_delta.shape:
            raise CheckpointError(
                f"{path}: the trained rows of {name} have the shape {list(trained.shape)}, "
                f"but this model needs {list(module.trainable_tokens_delta.shape)}"
            )
        with torch.no_grad():
            module.trainable_tokens_delta.copy_(trained)


# --- adapter_config.json ---


def _config(
    config: LoraConfig, joined: Mapping[str, _Adapter], linears: list[str], transposed: bool
) -> dict[str, Any]:
    ranks = {disk: len(adapter.a) for disk, adapter in joined.items()}
    alphas = {disk: adapter.alpha for disk, adapter in joined.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": config.r,
        "lora_alpha": _plain(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _shortest(set(joined), linears),
        "rank_pattern": {disk: rank for disk, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {d: _plain(a) for d, a in alphas.items() if a != config.lora_alpha},
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
    }


def _shortest(chosen: set[str], linears: list[str]) -> list[str]:
    """The shortest endings that match the chosen names and no other linear."""
    endings = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if {other for other in linears if ends_with(other, ending)} <= chosen:
                endings.add(ending)
                break
    return sorted(endings)


def _token_indices(
    rows: Mapping[str, TrainableTokens], disk_names: Mapping[str, DiskLinear]
) -> list[int] | dict[str, list[int]] | None:
    if not rows:
        return None
    if rows.keys() == {"embed_tokens"}:
        return rows["embed_tokens"].token_ids.tolist()  # PEFT finds the embedding by itself
    named = {_disk(disk_names, name).split(".")[-1]: module for name, module in rows.items()}
    return {name: module.token_ids.tolist() for name, module in named.items()}


def _check_settings(raw: Mapping[str, Any], path: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are supported"
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={raw['bias']!r} is not supported, only 'none'")
    start = raw.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} changes the base weights; convert the adapter "
            "with peft (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, value in raw.items():
        if key not in _READ | _HARMLESS and value:
            raise CheckpointError(
                f"{path}: {key}={value!r} would change results and is not supported; "
                "merge the adapter into its base with peft and load the merged model"
            )


def _targeted(raw: Mapping[str, Any], groups: list[_Group], path: Path) -> list[_Group]:
    """The disk linears that PEFT adapts with this config."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    chosen = [
        group
        for group in groups
        if _named(group.disk, targets)
        and not (excluded and _named(group.disk, excluded))
        and (not layers or isinstance(targets, str) or _layer(group.disk) in layers)
    ]
    if not chosen and targets:
        raise CheckpointError(
            f"{path}: target_modules {targets} matches no linear of this model, "
            f"which has {_some(group.disk for group in groups)}"
        )
    return chosen


def _named(disk: str, targets: str | list[str] | None) -> bool:
    if isinstance(targets, str):
        if targets == ALL_LINEAR:
            return disk.split(".")[-1] != "lm_head"
        return re.fullmatch(targets, disk) is not None
    return any(ends_with(disk, target) for target in targets or ())


def _layer(disk: str) -> int | None:
    match = re.match(r".*?\.[^.]*\.(\d+)\.", disk)
    return int(match[1]) if match else None


def _read_config(
    raw: Mapping[str, Any], chosen: list[_Group], indices: dict[str, tuple[int, ...]]
) -> LoraConfig:
    targets = raw.get("target_modules") or ()
    if isinstance(targets, str) and targets != ALL_LINEAR:
        targets = [group.disk for group in chosen]
    only_embedding = indices.keys() <= {"embed_tokens"}
    return LoraConfig(
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        lora_dropout=raw.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(raw.get("use_rslora")),
        trainable_token_indices=indices.get("embed_tokens", ()) if only_embedding else indices,
    )


def _read_indices(
    raw: Mapping[str, Any], disk_names: Mapping[str, DiskLinear], path: Path
) -> dict[str, tuple[int, ...]]:
    asked = raw.get("trainable_token_indices") or {}
    if not isinstance(asked, dict):
        return {"embed_tokens": tuple(asked)}
    ours = {
        name: tuple(ids)
        for target, ids in asked.items()
        for name in ("embed_tokens", "lm_head")
        if name in disk_names and ends_with(disk_names[name].name, target)
    }
    if len(ours) < len(asked):
        raise CheckpointError(
            f"{path}: trainable_token_indices names {sorted(asked)}, "
            "which are not all this model's embedding and head"
        )
    return ours


# --- tensors ---


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        pickled = path.with_suffix(".bin").exists()
        remedy = "load and save it with peft, which then writes safetensors" if pickled else ""
        raise CheckpointError(
            f"{path} does not exist; {remedy or 'the adapter is not complete'}"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _take(
    group: _Group, tensors: dict[str, Tensor], raw: Mapping[str, Any], path: Path
) -> _Adapter:
    """Remove the two tensors of a disk linear from `tensors`, checked against the config."""
    keys = [f"{_PREFIX}{group.disk}.lora_{letter}.weight" for letter in "AB"]
    if missing := [key for key in keys if key not in tensors]:
        raise CheckpointError(
            f"{path.with_name(ADAPTER_WEIGHTS)} lacks {', '.join(missing)}, "
            f"which {ADAPTER_CONFIG} calls for"
        )
    a, b = (tensors.pop(key).float() for key in keys)
    rank = _pattern(raw.get("rank_pattern") or {}, group.disk, raw.get("r", 8))
    alpha = _pattern(raw.get("alpha_pattern") or {}, group.disk, raw.get("lora_alpha", 8))
    expected = [rank, group.inputs], [sum(group.sizes), rank]
    if (list(a.shape), list(b.shape)) != expected:
        raise CheckpointError(
            f"{path.with_name(ADAPTER_WEIGHTS)}: {group.disk} has A {list(a.shape)} and "
            f"B {list(b.shape)}, expected {expected[0]} and {expected[1]}"
        )
    return _Adapter(a, b, alpha)


def _pattern(patterns: Mapping[str, Any], disk: str, default: Any) -> Any:
    """The value whose key is a regular expression for the end of the name; the first one wins."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", disk):
            return value
    return default


def _row_key(disk_names: Mapping[str, DiskLinear], name: str) -> str:
    return f"{_PREFIX}{_disk(disk_names, name)}{_TOKENS}"


def _disk(disk_names: Mapping[str, DiskLinear], name: str) -> str:
    if name not in disk_names:
        raise ConfigError(f"no name on disk is known for {name}, whose token rows are trained")
    return disk_names[name].name


def _alpha(alpha: int | float, rank: int, other: int, rslora: bool) -> int | float:
    """The alpha that gives the rank `other` the scale that `alpha` gives `rank`."""
    return alpha * math.sqrt(other) / math.sqrt(rank) if rslora else alpha * other / rank


def _plain(number: int | float) -> int | float:
    """32 rather than 32.0, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def _some(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more

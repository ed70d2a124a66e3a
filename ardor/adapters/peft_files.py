"""PEFT's files read: adapter_config.json and adapter_model.safetensors.

Source: peft 0.21, utils/save_and_load.py and tuners/lora/model.py.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ardor.adapters.config import (
    ALL_LINEAR,
    TOKEN_OWNERS,
    LoraConfig,
    by_pattern,
    ends_with,
    is_init,
    scale_of,
)
from ardor.adapters.embedding import LoraEmbedding, SavedModule, TrainableHead, TrainableTokens
from ardor.adapters.initial import OFF_BASE, Start, begin_at
from ardor.adapters.lora import (
    LoraExperts,
    LoraLinear,
    Wrapper,
    add_token_rows,
    is_tied,
    wrap,
    wrapped_modules,
)
from ardor.adapters.lora import replace as put
from ardor.adapters.peft_layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    NOTE,
    PREFIX,
    TOKENS,
    DiskLinear,
    Factors,
    Group,
    disk_name,
    from_file,
    groups_of,
    plain,
    scaled_alpha,
    split,
    tensor_key,
)
from ardor.adapters.peft_older import modernise
from ardor.adapters.peft_tables import settle_tables
from ardor.errors import CheckpointError
from ardor.files.json import read_object

# Keys of adapter_config.json that are read here.
_READ = {
    *("peft_type", "bias", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "trainable_token_indices"),
    *("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "layers_pattern"),
    *("target_parameters", "ensure_weight_tying", "lora_bias"),
}
# Keys that change nothing about an adapter that has been trained.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config"),
    *("eva_config", "runtime_config"),
}
# Ways to start that leave the base weights as they are; others (LoftQ, CorDA, ...) change them.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Files:
    """An adapter's directory as read; tensors are taken out as they find their places."""

    config: Path
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    note: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.config.with_name(ADAPTER_WEIGHTS)

    @property
    def halves(self) -> int:
        """2 where half of each rank is what training began with, taken off."""
        return LoraConfig(init_lora_weights=self.note.get("init", "default")).saves_rank

    @property
    def rslora(self) -> bool:
        return bool(self.raw.get("use_rslora"))

    def setting(self, key: str, disk: str, pattern: str, default: Any = 8) -> Any:
        """The rank or alpha of a module of theirs."""
        names = [disk, f"{disk}.weight"]  # the latter of a parameter among the targets
        return by_pattern(self.raw.get(pattern) or {}, names, self.raw.get(key, default))


def load_adapter(
    directory: str | Path, decoder: nn.Module, *, disk_names: Mapping[str, DiskLinear]
) -> LoraConfig:
    """Put the adapter of a PEFT directory on `decoder`; what it says about itself.

    On a decoder without an adapter the targets are wrapped, everything else is frozen, and the
    adapter can be trained. On one that has it already (to resume) its tensors are overwritten in
    place, so that an optimizer keeps its parameters.

    Raises: CheckpointError for a file that is missing or damaged, a setting that would change
        results and is not supported, an adapter for another base (naming the tensors), and tensors
        that are missing or left over.
    """
    path = Path(directory) / ADAPTER_CONFIG
    raw = read_object(path)
    tensors, note = _read_tensors(path.with_name(ADAPTER_WEIGHTS))
    files = _Files(path, raw, tensors, note)
    _check_settings(raw, path)
    groups = groups_of(decoder, disk_names)
    ranks = note.setdefault("ranks", {})
    modernise(raw, tensors, ranks, decoder, groups, disk_names, files.weights)
    settle_tables(raw, tensors, decoder, disk_names, path)
    present = dict(wrapped_modules(decoder))
    chosen = _targeted(raw, groups, path, embedding=disk_name(disk_names, "embed_tokens"))
    _check_present(present, groups, chosen, path)
    names = {group.disk for group in chosen}
    on_disk = {group: _take(group, files, tensor_key(group, names)) for group in chosen}
    _check_base(on_disk, files)
    others = _take_others(decoder, files, disk_names)
    if tensors:
        raise CheckpointError(
            f"{files.weights} holds tensors that {ADAPTER_CONFIG} or this model gives no place: "
            f"{_some(tensors)}; check that this is the adapter's base model"
        )
    _check_others(present, others, path)
    config = _read_config(files, chosen, others, disk_names)
    starts = {g: _offset(decoder, g, f, files) for g, f in on_disk.items() if present == {}}
    if not present:
        decoder.requires_grad_(False)
    for group, factors in on_disk.items():
        rank = files.note.get("ranks", {}).get(group.disk, config.rank((group.disk,)))
        _place_group(decoder, group, factors, config, rank, present, starts.get(group))
    for name, tensor in others.items():
        _place_other(decoder, name, tensor, config, files, disk_names, present)
    return config


def _check_settings(raw: Mapping[str, Any], path: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are supported"
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={raw['bias']!r} is not supported, only 'none'")
    start = raw.get("init_lora_weights", True)
    if start not in (*_KEEPS_BASE, *OFF_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} changes the base weights in a way that cannot be "
            "done again; convert the adapter with peft (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...))"
        )
    for key, value in raw.items():
        if key not in _READ | _HARMLESS and value:
            raise CheckpointError(
                f"{path}: {key}={value!r} would change results and is not supported; "
                "merge the adapter into its base with peft and load the merged model"
            )


def _check_present(
    present: Mapping[str, Wrapper], groups: list[Group], chosen: list[Group], path: Path
) -> None:
    """Raises: CheckpointError if an adapter that is there adapts other modules than the file's."""
    adapted = {group for group in groups if any(name in present for name in group.names)}
    if present and adapted != set(chosen):
        differ = sorted(group.disk for group in adapted ^ set(chosen))
        raise CheckpointError(
            f"{path} adapts other modules than this model does: they differ in {_some(differ)}"
        )


def _targeted(
    raw: Mapping[str, Any], groups: list[Group], path: Path, *, embedding: str
) -> list[Group]:
    """The disk linears that PEFT adapts with this config."""
    config = _as_config(raw)
    parameters = raw.get("target_parameters") or ()
    chosen = []
    for group in groups:
        if group.experts:
            found = any(ends_with(group.disk, entry) for entry in parameters)
        elif config.target_modules == ALL_LINEAR:
            head = group.disk.split(".")[-1] == "lm_head"
            found = not head and not config.excludes(group.disk)
        else:
            found = config.targets(group.disk)
        if not group.transposed:
            found = found or any(ends_with(f"{group.disk}.weight", entry) for entry in parameters)
        if found:
            chosen.append(group)
    targets = raw.get("target_modules")
    if not chosen and targets and not config.targets(embedding):
        raise CheckpointError(
            f"{path}: target_modules {targets} matches no linear of this model, "
            f"which has {_some(group.disk for group in groups)}"
        )
    return chosen


def _as_config(raw: Mapping[str, Any]) -> LoraConfig:
    """Of PEFT's config what says which modules it means."""

    def several(key: str) -> tuple[Any, ...]:
        value = raw.get(key)
        return () if value is None else (value,) if isinstance(value, str | int) else tuple(value)

    def names(key: str) -> str | tuple[str, ...]:
        value = raw.get(key)
        return value if isinstance(value, str) else several(key)

    targets = names("target_modules")
    layers = () if isinstance(targets, str) else several("layers_to_transform")
    return LoraConfig(
        target_modules=ALL_LINEAR if str(targets).lower() == ALL_LINEAR else targets,
        exclude_modules=names("exclude_modules"),
        modules_to_save=several("modules_to_save"),
        layers_to_transform=layers,
        layers_pattern=tuple(p for p in several("layers_pattern") if p) if layers else (),
    )


def _take(group: Group, files: _Files, key: str) -> Factors:
    """Remove the tensors of a disk linear from those of the files, as they are."""
    keys = [f"{key}.lora_{letter}.weight" for letter in "AB"]
    if files.raw.get("use_dora"):
        keys.append(f"{key}.lora_magnitude_vector")
    if files.raw.get("lora_bias"):
        keys.append(f"{key}.lora_B.bias")
    if missing := [name for name in keys if name not in files.tensors]:
        raise CheckpointError(
            f"{files.weights} lacks {', '.join(missing)}, which {ADAPTER_CONFIG} calls for on this "
            "base; load the base that it was trained on, or copy the adapter again"
        )
    found = {name: files.tensors.pop(name).float() for name in keys}
    for leaf in ("weight", "bias"):  # a head's, which PEFT saves again
        files.tensors.pop(f"{key}.base_layer.{leaf}", None)
    alpha = files.setting("lora_alpha", group.disk, "alpha_pattern")
    a, b = (found[name] for name in keys[:2])
    extra = (found.get(f"{key}.{leaf}") for leaf in ("lora_magnitude_vector", "lora_B.bias"))
    return Factors(a, b, alpha, *extra)


def _check_base(on_disk: dict[Group, Factors], files: _Files) -> None:
    """Put experts' tensors into their shapes.

    Raises: CheckpointError naming those that do not have the shapes of this base.
    """
    wrong = []
    for group, factors in [*on_disk.items()]:
        rank = files.setting("r", group.disk, "rank_pattern") * max(1, group.experts)
        expected = [rank, group.inputs], [sum(group.sizes), rank]
        found = list(factors.a.shape), list(factors.b.shape)
        if found != expected:
            wrong.append(
                f"{group.disk} has A {found[0]} and B {found[1]}, expected {expected[0]} and "
                f"{expected[1]}"
            )
            continue
        if factors.bias is not None and factors.bias.shape != (sum(group.sizes),):
            wrong.append(f"{group.disk} has a bias of B {list(factors.bias.shape)}")
            continue
        a, b = from_file(group, factors.a, factors.b)
        on_disk[group] = replace(factors, a=a, b=b)
    if wrong:
        base = files.raw.get("base_model_name_or_path")
        raise CheckpointError(
            f"{files.weights} is for another base than this model ({len(wrong)} of {len(on_disk)} "
            f"modules): {_some(wrong, 3)}; it was trained on {base or 'a base it does not name'}"
        )


def _offset(decoder: nn.Module, group: Group, factors: Factors, files: _Files) -> Start | None:
    """What PEFT took off the base when it began, from the base itself: the same every time."""
    kind = files.raw.get("init_lora_weights")
    if kind not in OFF_BASE:
        return None
    if group.experts:
        raise CheckpointError(f"{files.config}: init_lora_weights={kind!r} of experts")
    scale = scale_of(factors.rank, factors.alpha, rslora=files.rslora)
    return begin_at(kind, group.weight(decoder), factors.rank, scale)


def _place_group(
    decoder: nn.Module,
    group: Group,
    factors: Factors,
    config: LoraConfig,
    rank: int,
    present: Mapping[str, Wrapper],
    began: Start | None,
) -> None:
    members = [name for name in group.names if name in present or not present]
    doubled = config.saves_rank if began is None else 1
    ranks = {name: module.r for name, module in present.items() if hasattr(module, "r")}
    rank = cast(int, ranks.get(members[0], rank))
    parts = split(group, factors, members, rank * doubled)
    if parts is None:
        raise CheckpointError(f"the adapter of {group.disk} reaches beyond the adapted {members}")
    rows = dict(group.rows())
    for name, (a, b) in parts.items():
        r = a.shape[-2] // doubled
        alpha = scaled_alpha(factors.alpha, factors.rank, r, rslora=config.use_rslora)
        for known in (config.alpha((name, group.disk)), config.lora_alpha):
            alpha = known if math.isclose(alpha, known, rel_tol=1e-12) else alpha  # of square roots
        start = Start(a, b)
        offset = None if began is None else (began.a, began.b[rows[name]])
        if doubled == 2:
            start = Start(a[..., :r, :], b[..., :r])
            offset = a[..., r:, :], -b[..., r:]
        module = present.get(name)
        if module is None:
            module = _made(decoder.get_submodule(name), start, alpha, config)
            put(decoder, name, module)
        assert isinstance(module, LoraLinear | LoraExperts)
        if (module.r, module.alpha, module.rslora) != (r, alpha, config.use_rslora):
            raise CheckpointError(
                f"the saved adapter of {name} has rank {r} and alpha {alpha:g}, but the "
                f"model's has rank {module.r} and alpha {module.alpha:g}"
            )
        _fill(module, start, offset, factors, rows[name])


def _made(base: nn.Module, start: Start, alpha: int | float, config: LoraConfig) -> nn.Module:
    kept: dict[str, Any] = {"dropout": config.lora_dropout, "rslora": config.use_rslora}
    if start.a.ndim == 3:
        each = [Start(a, b) for a, b in zip(start.a, start.b, strict=True)]
        return LoraExperts(base, start.a.shape[1], alpha, start=each, **kept)
    kept |= {"dora": config.use_dora, "bias": config.lora_bias}
    return LoraLinear(base, len(start.a), alpha, start=start, **kept)


@torch.no_grad()
def _fill(
    module: LoraLinear | LoraExperts,
    start: Start,
    offset: tuple[Tensor, Tensor] | None,
    factors: Factors,
    rows: Tensor,
) -> None:
    """Overwrite in place what an adapter trains, and set what it began with."""
    module.lora_A.copy_(start.a)
    module.lora_B.copy_(start.b)
    if offset is not None:
        device = module.lora_A.device
        module.offset_A, module.offset_B = (t.float().to(device).contiguous() for t in offset)
    if factors.magnitude is not None and isinstance(module, LoraLinear):
        assert module.lora_magnitude_vector is not None
        module.lora_magnitude_vector.copy_(factors.magnitude[rows])
    if factors.bias is not None and isinstance(module, LoraLinear):
        assert module.lora_B_bias is not None
        module.lora_B_bias.copy_(factors.bias[rows])


def _take_others(
    decoder: nn.Module, files: _Files, disk_names: Mapping[str, DiskLinear]
) -> dict[str, Any]:
    """What is not an adapter of a linear, by our names: rows, modules in full, an embedding."""
    found: dict[str, Any] = {}
    tensors, raw = files.tensors, files.raw
    tied = is_tied(decoder)
    indices = _read_indices(raw, disk_names, files.config)
    for name, ids in indices.items():
        rows = tensors.pop(f"{PREFIX}{disk_name(disk_names, name)}{TOKENS}", None)
        if rows is None:
            raise CheckpointError(
                f"{files.config.parent} lacks the trained token rows of {sorted(indices)}"
            )
        found[name] = (ids, rows)
    for name, place in disk_names.items():
        key, head = f"{PREFIX}{place.name}", f"{PREFIX}lm_head"
        if f"{key}.lora_embedding_A" in tensors:
            parts = [tensors.pop(f"{key}.lora_embedding_{letter}") for letter in "AB"]
            if tied:
                for leaf in ("lora_A.weight", "lora_B.weight", "base_layer.weight"):
                    tensors.pop(f"{head}.{leaf}", None)
            found[name] = parts
        elif f"{key}.weight" in tensors and place.parts == 1 and raw.get("modules_to_save"):
            leaves = {leaf: tensors.pop(f"{key}.{leaf}", None) for leaf in ("weight", "bias")}
            if name == "embed_tokens" and tied:
                tensors.pop(f"{head}.weight", None)
            weight = leaves["weight"]
            assert weight is not None
            if place.transposed:
                leaves["weight"] = weight.T
            found[name] = {leaf: tensor for leaf, tensor in leaves.items() if tensor is not None}
    for entry in raw.get("modules_to_save") or ():
        saved = (n for n, value in found.items() if isinstance(value, dict))
        follows = tied and entry == "lm_head" and "embed_tokens" in found
        if not follows and not any(ends_with(disk_name(disk_names, n), entry) for n in saved):
            raise CheckpointError(f"{files.weights} lacks the weights of {entry} (modules_to_save)")
    return found


def _check_others(present: Mapping[str, Wrapper], others: Mapping[str, Any], path: Path) -> None:
    """Raises: CheckpointError if the model trains other modules beside linears than the file's."""
    held = {name for name, m in present.items() if not isinstance(m, LoraLinear | LoraExperts)}
    if present and held != others.keys():
        rows = any(isinstance(present.get(name), TrainableTokens) for name in held ^ others.keys())
        what = "the rows of different tokens" if rows else f"different modules: {held ^ {*others}}"
        raise CheckpointError(f"{path} and this model train {what}")


def _place_other(
    decoder: nn.Module,
    name: str,
    value: Any,
    config: LoraConfig,
    files: _Files,
    disk_names: Mapping[str, DiskLinear],
    present: Mapping[str, Wrapper],
) -> None:
    module = present.get(name)
    if isinstance(value, tuple):
        _place_rows(decoder, name, value, files.config, present)
        return
    if isinstance(value, list):
        disk = disk_name(disk_names, name)
        if module is None:
            r = files.setting("r", disk, "rank_pattern")
            alpha = files.setting("lora_alpha", disk, "alpha_pattern")
            base = decoder.get_submodule(name)
            module = LoraEmbedding(base, r, alpha, rslora=config.use_rslora)
            wrap(decoder, name, module)
        assert isinstance(module, LoraEmbedding)
        targets = {"A": module.lora_embedding_A, "B": module.lora_embedding_B}
        values = {"A": value[0], "B": value[1]}
    else:
        if module is None:
            module = SavedModule(decoder.get_submodule(name))
            wrap(decoder, name, module)
        assert isinstance(module, SavedModule)
        targets, values = dict(module.copy.named_parameters()), value
    for leaf, target in targets.items():
        tensor = values.get(leaf)
        if tensor is None or tensor.shape != target.shape:
            has = "none" if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"{files.weights} is for another base than this model: {name} has {leaf} {has}, "
                f"expected {list(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)


def _place_rows(
    decoder: nn.Module,
    name: str,
    value: tuple[tuple[int, ...], Tensor],
    path: Path,
    present: Mapping[str, Wrapper],
) -> None:
    ids, trained = value
    if not present:
        add_token_rows(decoder, {name: ids})
    held = decoder.get_submodule(name)
    module = held.tokens if isinstance(held, TrainableHead) else held
    if not isinstance(module, TrainableTokens) or tuple(module.token_ids.tolist()) != ids:
        raise CheckpointError(f"{path} and this model train the rows of different tokens")
    if trained.shape != module.trainable_tokens_delta.shape:
        raise CheckpointError(
            f"{path}: the trained rows of {name} have the shape {list(trained.shape)}, "
            f"but this model needs {list(module.trainable_tokens_delta.shape)}"
        )
    with torch.no_grad():
        module.trainable_tokens_delta.copy_(trained)


def _read_config(
    files: _Files,
    chosen: list[Group],
    others: Mapping[str, Any],
    disk_names: Mapping[str, DiskLinear],
) -> LoraConfig:
    raw, said = files.raw, _as_config(files.raw)
    init = files.note.get("init", raw.get("init_lora_weights"))
    r, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    doubled = files.halves
    targets = said.target_modules
    if targets != ALL_LINEAR and (isinstance(targets, str) or raw.get("target_parameters")):
        targets = tuple(group.disk for group in chosen)
    indices = {name: value[0] for name, value in others.items() if isinstance(value, tuple)}
    only_embedding = indices.keys() <= {"embed_tokens"}
    ranks, alphas = (raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    return replace(
        said,
        r=r // doubled,
        lora_alpha=plain(scaled_alpha(alpha, r, r // doubled, rslora=files.rslora)),
        lora_dropout=files.note.get("dropout", raw.get("lora_dropout", 0.0)),
        target_modules=targets,
        use_rslora=files.rslora,
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        init_lora_weights=init if isinstance(init, str) and is_init(init) else "default",
        modules_to_save=tuple(
            disk_name(disk_names, name) for name, value in others.items() if isinstance(value, dict)
        ),
        trainable_token_indices=indices.get("embed_tokens", ()) if only_embedding else indices,
        rank_pattern={key: rank // doubled for key, rank in ranks.items()},
        alpha_pattern={
            key: scaled_alpha(a, doubled, 1, rslora=files.rslora) for key, a in alphas.items()
        },
    )


def _read_indices(
    raw: Mapping[str, Any], disk_names: Mapping[str, DiskLinear], path: Path
) -> dict[str, tuple[int, ...]]:
    asked = raw.get("trainable_token_indices") or {}
    if not isinstance(asked, dict):
        return {"embed_tokens": tuple(asked)} if asked else {}
    ours = {
        name: tuple(ids)
        for target, ids in asked.items()
        for name in TOKEN_OWNERS
        if name in disk_names and ends_with(disk_names[name].name, target)
    }
    if len(ours) < len(asked):
        raise CheckpointError(
            f"{path}: trainable_token_indices names {sorted(asked)}, "
            "which are not all this model's embedding and head"
        )
    return ours


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what Ardor noted beside them."""
    try:
        data = path.read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header.get("__metadata__", {}).get(NOTE, "{}"))
    except FileNotFoundError:
        pickled = path.with_suffix(".bin")
        remedy = (
            f"{pickled.name} beside it is a pickle, which can run code and is not read; if you "
            "trust it, load it with peft and save it again (PeftModel.save_pretrained), which "
            "then writes safetensors"
            if pickled.exists()
            else "the adapter is not complete"
        )
        raise CheckpointError(f"{path} does not exist; {remedy}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _some(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more

"""PEFT's files written: adapter_config.json and adapter_model.safetensors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ardor.adapters.config import LoraConfig
from ardor.adapters.embedding import LoraEmbedding, SavedModule, TrainableTokens
from ardor.adapters.lora import (
    LoraExperts,
    LoraLinear,
    Wrapper,
    is_tied,
    lora_modules,
    wrapped_modules,
)
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
    groups_of,
    join,
    plain,
    scaled_alpha,
    shortest_endings,
    tensor_key,
    to_file,
)
from ardor.errors import ConfigError
from ardor.files.atomic import write_atomic
from ardor.files.json import write_json


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
    adapter whose rank is the sum of theirs, with the same scale. One that began at a part of W
    (PiSSA, OLoRA) is written with twice its rank, exactly, on the base as it is. Each file appears
    whole or not at all, the weights first; other files of the directory stay.

    Raises: ConfigError if there is nothing to save, or `disk_names` lacks a module.
    """
    adapted = dict(lora_modules(decoder))
    groups = [
        group
        for group in groups_of(decoder, disk_names)
        if any(name in adapted for name in group.names)
    ]
    others = {name: m for name, m in wrapped_modules(decoder) if name not in adapted}
    if not groups and not others and not adapted:
        raise ConfigError("this model has no adapter to save; save the model instead")
    if lost := adapted.keys() - {name for group in groups for name in group.names}:
        raise ConfigError(f"no name on disk is known for the adapted {sorted(lost)}")
    tied = is_tied(decoder)
    tensors: dict[str, Tensor] = {}
    joined = {g: join(g, adapted, decoder, rslora=config.use_rslora) for g in groups}
    for group, factors in joined.items():
        key = tensor_key(group, {one.disk for one in groups})
        a, b = to_file(group, factors)
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if factors.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = factors.magnitude
        if factors.bias is not None:
            tensors[f"{key}.lora_B.bias"] = factors.bias
    for name, module in others.items():
        tensors |= _other_tensors(name, module, _place(disk_names, name), tied=tied)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    written = _config(config, joined, others, disk_names)
    written |= {"base_model_name_or_path": base_model, "revision": revision}
    written["ensure_weight_tying"] = tied and _ties(others)
    note = {
        "init": config.init_lora_weights,
        "dropout": config.lora_dropout,
        "ranks": {g.disk: _own_rank(g, adapted) for g in groups if len(g.names) > 1},
    }
    metadata = {"format": "pt", NOTE: json.dumps(note)}
    unshared = {key: tensor.clone() for key, tensor in tensors.items()}
    data = _same_every_time(save(unshared, metadata=metadata))
    write_atomic(Path(directory) / ADAPTER_WEIGHTS, data)
    write_json(Path(directory) / ADAPTER_CONFIG, written)


def _same_every_time(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: safetensors writes them in that of a hash."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _own_rank(group: Group, adapted: Mapping[str, LoraLinear | LoraExperts]) -> int:
    """Of the parts of a group, which joined have the sum of theirs."""
    return next(adapted[name].r for name in group.names if name in adapted)


def _other_tensors(
    name: str, module: Wrapper, place: DiskLinear, *, tied: bool
) -> dict[str, Tensor]:
    """Of what is not a low-rank adapter of a linear."""
    found: dict[str, Tensor]
    key, head = f"{PREFIX}{place.name}", f"{PREFIX}lm_head"
    if isinstance(module, TrainableTokens):
        return {f"{key}{TOKENS}": module.trainable_tokens_delta}
    if isinstance(module, LoraEmbedding):
        a, b = module.lora_embedding_A, module.lora_embedding_B
        found = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
        if tied:
            found |= {f"{head}.lora_A.weight": b.T, f"{head}.lora_B.weight": a.T}
        return found
    assert isinstance(module, SavedModule)
    found = {
        f"{key}.{leaf}": p.T if place.transposed and leaf == "weight" else p
        for leaf, p in module.copy.named_parameters()
    }
    if tied and name == "embed_tokens":
        found[f"{head}.weight"] = module.weight
    return found


def _ties(others: Mapping[str, Wrapper]) -> bool:
    return isinstance(others.get("embed_tokens"), LoraEmbedding | SavedModule)


def _config(
    config: LoraConfig,
    joined: Mapping[Group, Factors],
    others: Mapping[str, Wrapper],
    disk_names: Mapping[str, DiskLinear],
) -> dict[str, Any]:
    doubled = config.saves_rank
    r = config.r * doubled
    alpha = scaled_alpha(config.lora_alpha, config.r, r, rslora=config.use_rslora)
    linears = {group: factors for group, factors in joined.items() if not group.experts}
    experts = {group for group in joined if group.experts}
    known = [p.name for p in disk_names.values() if not p.experts]
    places = {name: disk_name(disk_names, name) for name in others}
    found = {group.disk: (f.rank, f.alpha) for group, f in joined.items()}
    found |= {
        places[name]: (m.r, m.alpha) for name, m in others.items() if isinstance(m, LoraEmbedding)
    }
    targets = {g.disk for g in linears} | (found.keys() - {g.disk for g in joined})
    parameters = [p.name for p in disk_names.values() if p.experts]
    saved = [places[n] for n, m in others.items() if isinstance(m, SavedModule)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": plain(alpha),
        # PEFT has no dropout in front of experts, and refuses what names it.
        "lora_dropout": 0.0 if experts else config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "target_modules": shortest_endings(targets, [*dict.fromkeys(known)]),
        "target_parameters": shortest_endings({g.disk for g in experts}, parameters) or None,
        "modules_to_save": shortest_endings({*saved}, [*dict.fromkeys(known)]) or None,
        "rank_pattern": {disk: rank for disk, (rank, _) in found.items() if rank != r},
        "alpha_pattern": {
            disk: plain(a) for disk, (_, a) in found.items() if not math.isclose(a, alpha)
        },
        "fan_in_fan_out": any(group.transposed for group in linears),
        "init_lora_weights": True,
        "trainable_token_indices": _token_indices(others, disk_names),
    }


def _token_indices(
    others: Mapping[str, Wrapper], disk_names: Mapping[str, DiskLinear]
) -> list[int] | dict[str, list[int]] | None:
    rows = {name: m for name, m in others.items() if isinstance(m, TrainableTokens)}
    if not rows:
        return None
    if rows.keys() == {"embed_tokens"}:
        return rows["embed_tokens"].token_ids.tolist()  # PEFT finds the embedding by itself
    return {
        disk_name(disk_names, name).split(".")[-1]: module.token_ids.tolist()
        for name, module in rows.items()
    }


def _place(disk_names: Mapping[str, DiskLinear], name: str) -> DiskLinear:
    if name not in disk_names:
        raise ConfigError(f"no name on disk is known for {name}, which is trained")
    return disk_names[name]

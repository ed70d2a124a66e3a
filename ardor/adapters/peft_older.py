"""Adapters made on the module trees of earlier versions of transformers, as made on those of today.

PEFT names tensors after the modules of transformers, whose version 5 renamed some. All experts of a
layer are one parameter there, where each was a module; and routers are linear maps no longer, so
that PEFT adapts their weight as a parameter.

Axes: R adapter rank, E experts.
Source: PEFT 0.21, utils/transformers_weight_conversion.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor.adapters.config import by_pattern, ends_with, scale_of
from ardor.adapters.peft_layout import (
    PREFIX,
    DiskLinear,
    Factors,
    Group,
    scaled_alpha,
    tensor_key,
    to_file,
)
from ardor.errors import CheckpointError

_EXPERT = re.compile(
    re.escape(PREFIX) + r"((?P<layer>.+)\.[^.]+\.experts\.(?P<expert>\d+)\.(?P<map>\w+))"
    r"\.lora_A\.weight"
)
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names by ours


Parts = dict[int, tuple[str, Tensor, Tensor]]
"""The adapters of one linear map by expert: the name of its module, A and B."""


def modernise(
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    ranks: dict[str, int],
    decoder: nn.Module,
    groups: list[Group],
    disk_names: Mapping[str, DiskLinear],
    where: Path,
) -> None:
    """Change a config and its tensors into what PEFT would write for the modules of today.

    `ranks` takes the rank that the parts of a joined parameter had. An adapter of a router becomes
    a router trained in full, which computes the same.

    Raises: CheckpointError for experts of which some have no adapter.
    """
    _rename(raw, tensors, [*disk_names.values()])
    _join_experts(raw, tensors, ranks, groups, where)
    linears = {name for group in groups for name in group.names}
    for name, place in disk_names.items():
        if name not in linears and f"{PREFIX}{place.name}.lora_A.weight" in tensors:
            _take_router(raw, tensors, decoder.get_submodule(name), place.name)


def _rename(raw: dict[str, Any], tensors: dict[str, Tensor], places: list[DiskLinear]) -> None:
    now = {place.older: place.name for place in places if place.older is not None}
    for older, name in now.items():
        stem = f"{PREFIX}{older}."
        for key in [key for key in tensors if key.startswith(stem)]:
            tensors[f"{PREFIX}{name}.{key.removeprefix(stem)}"] = tensors.pop(key)
    for setting in ("target_modules", "modules_to_save"):
        entries = raw.get(setting)
        if isinstance(entries, list):
            gone = {entry for entry in entries if any(ends_with(older, entry) for older in now)}
            new = [name for older, name in now.items() if any(ends_with(older, e) for e in gone)]
            stay = {e for e in gone if any(ends_with(place.name, e) for place in places)}
            raw[setting] = [entry for entry in entries if entry not in gone - stay] + new


def _join_experts(
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    ranks: dict[str, int],
    groups: list[Group],
    where: Path,
) -> None:
    """Adapters of each expert's own maps as one of the parameter of all of them."""
    found: dict[tuple[str, str], Parts] = {}
    for key in [*tensors]:
        other = key.replace(".lora_A.", ".lora_B.")
        if (match := _EXPERT.fullmatch(key)) and other in tensors:
            leaf = _LEAVES.get(match["map"], match["map"])
            parts = found.setdefault((match["layer"], leaf), {})
            parts[int(match["expert"])] = match[1], tensors.pop(key), tensors.pop(other)
    joined: dict[Group, Factors] = {}
    for group in (group for group in groups if group.experts):
        layer = group.disk.rsplit(".", 3)[0]
        own = {name: found.pop((layer, name.rpartition(".")[2]), None) for name in group.names}
        members = {name: parts for name, parts in own.items() if parts is not None}
        if members:
            joined[group] = _joined(group, members, raw, where)
            if len(members) == len(group.names):
                ranks[group.disk] = joined[group].rank // len(members)
    for module, a, b in (one for parts in found.values() for one in parts.values()):
        # Of no experts of this model: back among what is found to have no place.
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    named = {group.disk for group in joined}
    for group, factors in joined.items():
        key = tensor_key(group, named)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = to_file(group, factors)
        for setting, value in (("rank_pattern", factors.rank), ("alpha_pattern", factors.alpha)):
            raw[setting] = {re.escape(group.disk): value} | (raw.get(setting) or {})
    if joined:
        raw["target_parameters"] = [*(raw.get("target_parameters") or ()), *sorted(named)]


def _joined(
    group: Group, members: Mapping[str, Parts], raw: dict[str, Any], where: Path
) -> Factors:
    """One A above the other, and every B in the rows and columns of its own."""
    rslora, rows = bool(raw.get("use_rslora")), dict(group.rows())
    each = {name: _stacked(parts, group.experts, raw, where) for name, parts in members.items()}
    first = next(iter(each.values()))
    joined_a = torch.cat([one.a for one in each.values()], 1)
    joined_b = joined_a.new_zeros(group.experts, sum(group.sizes), joined_a.shape[1])
    scale = scale_of(first.rank, first.alpha, rslora=rslora)
    start = 0
    for name, one in each.items():
        end, own = start + one.rank, scale_of(one.rank, one.alpha, rslora=rslora)
        joined_b[:, rows[name], start:end] = one.b if own == scale else one.b * (own / scale)
        start = end
    alpha = scaled_alpha(first.alpha, first.rank, joined_a.shape[1], rslora=rslora)
    return Factors(joined_a, joined_b, alpha)


def _stacked(parts: Parts, count: int, raw: Mapping[str, Any], where: Path) -> Factors:
    """Of one map of all experts.

    Raises: CheckpointError unless there are adapters of one rank and alpha on all of them.
    """
    kinds = {(tuple(a.shape), tuple(b.shape), _alpha(raw, [m])) for m, a, b in parts.values()}
    if {*parts} != {*range(count)} or len(kinds) > 1:
        raise CheckpointError(
            f"{where}: {len(parts)} of the {count} experts beside {next(iter(parts.values()))[0]} "
            f"have an adapter, of {len(kinds)} ranks or alphas; only adapters of one rank and one "
            "alpha on all experts are read, so merge this one into its base with peft"
        )
    ordered = [parts[expert] for expert in range(count)]
    a, b = torch.stack([a for _, a, _ in ordered]), torch.stack([b for _, _, b in ordered])
    return Factors(a, b, _alpha(raw, [ordered[0][0]]))


@torch.no_grad()
def _take_router(
    raw: dict[str, Any], tensors: dict[str, Tensor], router: nn.Module, disk: str
) -> None:
    held = dict(router.named_parameters())
    if not {"weight"} <= held.keys() <= {"weight", "bias"}:
        return  # what has no place is then named
    a, b = (tensors.pop(f"{PREFIX}{disk}.lora_{letter}.weight").float() for letter in "AB")
    alpha = _alpha(raw, [disk, f"{disk}.weight"])
    scale = scale_of(len(a), alpha, rslora=bool(raw.get("use_rslora")))
    for leaf, tensor in held.items():
        added = scale * (b @ a).to(tensor.device) if leaf == "weight" else 0.0
        tensors[f"{PREFIX}{disk}.{leaf}"] = tensor.float() + added
    raw["modules_to_save"] = [*(raw.get("modules_to_save") or ()), disk]


def _alpha(raw: Mapping[str, Any], names: list[str]) -> int | float:
    return by_pattern(raw.get("alpha_pattern") or {}, names, raw.get("lora_alpha", 8))

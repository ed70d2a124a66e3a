"""Between our modules and those of transformers, whose names and shapes PEFT's files have.

Where one of its linears holds several of ours (GPT-2's c_attn is q, k and v; gate and up of all
experts are one parameter), their adapters are joined or split so that both compute the same:

    PEFT:  y = B A x        B (3D, R)        ours:  q = B_q A_q x,  k = B_k A_k x,  v = B_v A_v x

Axes: R adapter rank, E experts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ardor.adapters.initial import dense_weight
from ardor.adapters.lora import (
    LoraExperts,
    LoraLinear,
    is_experts,
    linear_names,
    size_of,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"
NOTE = "ardor"  # in the metadata of the weights: what PEFT's config has no word for


@runtime_checkable
class DiskLinear(Protocol):
    """Where transformers has a module of ours."""

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
    @property
    def experts(self) -> bool: ...  # it names a parameter of all experts, not a module
    @property
    def older(self) -> str | None: ...  # what the module was called, if it was renamed


@dataclass(frozen=True)
class Group:
    """A linear of transformers and the linears of ours in it, by part."""

    disk: str
    names: tuple[str, ...]
    inputs: int
    sizes: tuple[int, ...]  # outputs of each part
    transposed: bool
    groups: int
    experts: int  # 0: a plain linear

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """The indices of each part's outputs among those of the linear on disk."""
        grouped = torch.arange(sum(self.sizes)).unflatten(0, (self.groups, -1))
        parts = grouped.split([size // self.groups for size in self.sizes], 1)
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.flatten()

    def weight(self, decoder: nn.Module) -> Tensor:
        """Of the whole linear, float32, without adapters."""
        found: Tensor | None = None
        for name, rows in self.rows():
            part = dense_weight(base_of(decoder.get_submodule(name)))
            if found is None:
                found = part.new_empty(*part.shape[:-2], sum(self.sizes), self.inputs)
            found[..., rows.to(part.device), :] = part
        assert found is not None
        return found


@dataclass(frozen=True)
class Factors:
    """One adapter as it is on disk, with an axis in front for experts."""

    a: Tensor  # ([E], R, in)
    b: Tensor  # ([E], out, R)
    alpha: int | float
    magnitude: Tensor | None = None  # (out,)
    bias: Tensor | None = None  # (out,): of B

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


Adapted = LoraLinear | LoraExperts


def base_of(module: nn.Module) -> nn.Module:
    """What is under an adapter, or the module itself."""
    return module.base if isinstance(module, Adapted) else module


def groups_of(decoder: nn.Module, disk_names: Mapping[str, DiskLinear]) -> list[Group]:
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
        modules = [decoder.get_submodule(name) for name in names]
        experts: Any = getattr(modules[0], "count", 0) if is_experts(modules[0]) else 0
        sizes = tuple(size_of(module)[1] for module in modules)
        found.append(
            Group(
                disk,
                names,
                size_of(modules[0])[0],
                sizes,
                place.transposed and not experts,
                place.groups,
                experts,
            )
        )
    return found


def join(
    group: Group, adapted: Mapping[str, Adapted], decoder: nn.Module, *, rslora: bool
) -> Factors:
    """The adapters of a group's parts as one: with one A if theirs are equal, else with their rank
    in sum. What they began with and is taken off is among them."""
    members = [(adapted[name], rows) for name, rows in group.rows() if name in adapted]
    first = members[0][0]
    wholes = [module.whole for module, _ in members]
    a, b = wholes[0]
    rank = a.shape[-2]
    alpha = scaled_alpha(first.alpha, first.r, rank, rslora=rslora)
    magnitude, bias = _magnitudes(group, adapted, decoder), _biases(group, adapted, first.scale)
    if len(group.names) == 1:
        return Factors(a, b, alpha, magnitude, bias)
    front = a.shape[:-2]
    shared = len(members) == len(group.names) and all(
        module.scale == first.scale and torch.equal(one, a)
        for (module, _), (one, _) in zip(members, wholes, strict=True)
    )
    if shared:
        joined = b.new_empty(*front, sum(group.sizes), rank)
        for (_, rows), (_, own) in zip(members, wholes, strict=True):
            joined[..., rows, :] = own
        return Factors(a, joined, alpha, magnitude, bias)
    joined_a = torch.cat([one for one, _ in wholes], -2)
    joined = a.new_zeros(*front, sum(group.sizes), joined_a.shape[-2])
    start = 0
    for (module, rows), (own_a, own_b) in zip(members, wholes, strict=True):
        # One scale serves the whole group; nothing is multiplied where they are equal already.
        same = module.scale == first.scale
        end = start + own_a.shape[-2]
        block = own_b if same else own_b * (module.scale / first.scale)
        joined[..., rows, start:end] = block
        start = end
    alpha = scaled_alpha(first.alpha, first.r, joined_a.shape[-2], rslora=rslora)
    return Factors(joined_a, joined, alpha, magnitude, bias)


def _magnitudes(group: Group, adapted: Mapping[str, Adapted], decoder: nn.Module) -> Tensor | None:
    """DoRA's of the whole group: the norms of the base where a part has no adapter."""
    found = {
        name: module.lora_magnitude_vector
        for name, module in adapted.items()
        if name in group.names and isinstance(module, LoraLinear)
    }
    if not any(vector is not None for vector in found.values()):
        return None
    joined = torch.empty(sum(group.sizes))
    for name, rows in group.rows():
        own = found.get(name)
        if own is None:
            own = dense_weight(decoder.get_submodule(name)).norm(dim=1)
        joined[rows] = own.detach().float().cpu()
    return joined


def _biases(group: Group, adapted: Mapping[str, Adapted], scale: float) -> Tensor | None:
    """Those of B of the whole group, under one scale: 0 where a part has no adapter."""
    found = {name: getattr(adapted.get(name), "lora_B_bias", None) for name in group.names}
    if not any(bias is not None for bias in found.values()):
        return None
    joined = torch.zeros(sum(group.sizes))
    for name, rows in group.rows():
        if (own := found[name]) is not None:
            same = adapted[name].scale == scale
            joined[rows] = (own if same else own * (adapted[name].scale / scale)).detach().cpu()
    return joined


def split(
    group: Group, factors: Factors, members: list[str], rank: int
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """A and B of each member, or None if the parts that are no members are adapted too.

    What `join` made block-diagonal (its rank says so) comes apart into the same blocks again.
    """
    places, b = dict(group.rows()), factors.b
    for name, rows in places.items():
        biased = factors.bias is not None and factors.bias[rows].any()
        if name not in members and (biased or b[..., rows, :].any()):
            return None
    if factors.rank == rank * len(members):
        blocks = {m: slice(i * rank, (i + 1) * rank) for i, m in enumerate(members)}
        rest = b.clone()
        for name, columns in blocks.items():
            rest[..., places[name], columns] = 0
        if not rest.any():
            return {m: (factors.a[..., c, :], b[..., places[m], c]) for m, c in blocks.items()}
    return {name: (factors.a, b[..., places[name], :]) for name in members}


def to_file(group: Group, factors: Factors) -> tuple[Tensor, Tensor]:
    """A and B as files have them: those of experts in one matrix each.

    Source: PEFT 0.21, lora.layer.ParamWrapper.get_delta_factors.
    """
    if not group.experts:
        return factors.a, factors.b
    return factors.a.flatten(0, 1), factors.b.permute(1, 2, 0).flatten(1, 2)


def from_file(group: Group, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `to_file`."""
    if not group.experts:
        return a, b
    b = b.unflatten(1, (-1, group.experts)).permute(2, 0, 1)
    return a.unflatten(0, (group.experts, -1)), b.contiguous()


def scaled_alpha(alpha: int | float, rank: int, other: int, *, rslora: bool) -> int | float:
    """The alpha that gives the rank `other` the scale that `alpha` gives `rank`."""
    if rank == other:
        return alpha
    return alpha * math.sqrt(other) / math.sqrt(rank) if rslora else alpha * other / rank


def shortest_endings(chosen: set[str], known: list[str]) -> list[str]:
    """The shortest endings that match the chosen names and no other one that is known."""
    from_end = {name: name.split(".") for name in known}
    endings = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            others = {
                other for other, ends in from_end.items() if ends[-length:] == parts[-length:]
            }
            if others <= chosen:
                endings.add(".".join(parts[-length:]))
                break
    return sorted(endings)


def tensor_key(group: Group, targeted: set[str]) -> str:
    """What the names of a group's tensors begin with.

    Adapters of several parameters of one module are nested in the order of the parameters.
    """
    if not group.experts:
        return f"{PREFIX}{group.disk}"
    module, _, parameter = group.disk.rpartition(".")
    outer = parameter != "down_proj" and f"{module}.down_proj" in targeted
    return f"{PREFIX}{module}" + (".base_layer" if outer else "")


def disk_name(disk_names: Mapping[str, DiskLinear], name: str) -> str:
    return disk_names[name].name if name in disk_names else name


def plain(number: int | float) -> int | float:
    """32 rather than 32.0, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number

"""Tensor names on disk <-> tensor names in memory, both ways and bit for bit.

A rule takes one tensor on disk to one tensor in memory, or to several that are joined in it; or
several on disk to one in memory. Nothing is computed: a rule transposes, cuts and stacks.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

from ardor.errors import CheckpointError

_value = dataclass(frozen=True, kw_only=True, slots=True)


Read = Callable[[str], Any]
"""A tensor by its name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor on disk and what it is in memory: parts of one axis, in order.

    The axis holds the parts `groups` times over: in each group come first the rows of the first
    part, then those of the second. `sizes` are all rows of each part (None: equal parts).
    """

    disk: str
    memory: tuple[str, ...]
    transposed: bool = (
        False  # on disk as [.., in, out] (GPT-2's Conv1D); in memory as [.., out, in]
    )
    sizes: tuple[int, ...] | None = None
    groups: int = 1
    axis: int = 0  # 1 where all experts are stacked in one tensor

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors on disk."""
        return (self.disk,)

    def shapes(self, shape_on_disk: Callable[[str], Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The shape of each part.

        Raises: CheckpointError if the tensor on disk cannot be cut so.
        """
        on_disk = tuple(shape_on_disk(self.disk))
        shape = (*on_disk[:-2], *on_disk[-2:][::-1]) if self.transposed else on_disk
        if len(self.memory) == 1:
            return {self.memory[0]: shape}
        if len(shape) <= self.axis:
            raise CheckpointError(f"{self.disk} has the shape {list(on_disk)}: too few axes")
        length = shape[self.axis]
        sizes = self.sizes or (length // len(self.memory),) * len(self.memory)
        if sum(sizes) != length:
            raise CheckpointError(
                f"{self.disk} of shape {list(on_disk)} does not split into {len(self.memory)} parts"
                + (f" of {list(self.sizes)}" if self.sizes else "")
            )
        return {
            name: (*shape[: self.axis], size, *shape[self.axis + 1 :])
            for name, size in zip(self.memory, sizes, strict=True)
        }

    def to_memory(self, read: Read) -> dict[str, Any]:
        """The parts by their names in memory; views where they can be."""
        tensor = read(self.disk)
        whole = tensor.mT if self.transposed else tensor
        if len(self.memory) == 1:
            return {self.memory[0]: whole}
        cut = self._cut(whole)
        return {
            name: part.flatten(self.axis, self.axis + 1)
            for name, part in zip(self.memory, cut, strict=True)
        }

    def to_disk(self, read: Read) -> dict[str, Any]:
        """The tensor as it is on disk, by its name; a view where it can be."""
        parts = [read(name) for name in self.memory]
        whole = parts[0]
        if len(parts) > 1:
            shape = list(whole.shape)
            shape[self.axis] = sum(part.shape[self.axis] for part in parts)
            whole = whole.new_empty(shape)
            for place, part in zip(self._cut(whole), parts, strict=True):
                place.copy_(part.unflatten(self.axis, (self.groups, -1)))
        return {self.disk: whole.mT if self.transposed else whole}

    def _cut(self, whole: Any) -> Iterator[Any]:
        """Views [.., groups, rows of the part within a group, ..] of each part."""
        grouped = whole.unflatten(self.axis, (self.groups, -1))
        length, count = grouped.shape[self.axis + 1], len(self.memory)
        sizes = [size // self.groups for size in self.sizes or ()] or [length // count] * count
        starts = accumulate(sizes, initial=0)
        for start, size in zip(starts, sizes, strict=False):
            # Not `split`: what it gives must not be written to.
            yield grouped.narrow(self.axis + 1, start, size)


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors on disk that are one in memory, on a new first axis: one per expert, or per head."""

    disk: tuple[str, ...]
    memory: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.disk

    def shapes(self, shape_on_disk: Callable[[str], Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The shape of the stack.

        Raises: CheckpointError if the tensors differ in shape.
        """
        found = {name: tuple(shape_on_disk(name)) for name in self.disk}
        first = found[self.disk[0]]
        for name, shape in found.items():
            if shape != first:
                raise CheckpointError(
                    f"{name} has the shape {list(shape)}, but {self.disk[0]} {list(first)}"
                )
        return {self.memory: (len(self.disk), *first)}

    def to_memory(self, read: Read) -> dict[str, Any]:
        first = read(self.disk[0])
        whole = first.new_empty((len(self.disk), *first.shape))
        for place, name in zip(whole, self.disk, strict=True):
            place.copy_(read(name))
        return {self.memory: whole}

    def to_disk(self, read: Read) -> dict[str, Any]:
        return dict(zip(self.disk, read(self.memory), strict=True))


@dataclass(frozen=True, slots=True)
class Either:
    """Two ways in which checkpoints hold the same tensors; new ones are written the first way."""

    ways: tuple[tuple["Rule | Stack", ...], ...]


@_value
class Ignorable:
    """Tensors that checkpoints hold and no result depends on."""

    pattern: str  # matches the whole name, without the family's prefix
    reason: str
    kept: bool = False  # saved again as they were, for others to read
    beside: str | None = None  # only if this one is there too, without the prefix


class Account(NamedTuple):
    """Which names fit. All of the first two must be empty for a checkpoint to be whole."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: Mapping[str, Ignorable]  # name -> why


@_value
class Rules:
    """Every tensor of one model. `bind` fits them to the naming that a checkpoint uses."""

    rules: tuple[Rule | Stack | Either, ...]
    prefix: str = ""  # in front of most names; checkpoints of the bare body lack it
    aliases: tuple[str, ...] = ()  # prefixes that checkpoints have instead
    tied_head: Rule | None = None  # a second copy of the embedding, which a checkpoint may hold
    head_copied: bool = False  # this checkpoint does: equal on loading, and saved again
    ignorable: tuple[Ignorable, ...] = ()

    @property
    def plain(self) -> tuple[Rule | Stack, ...]:
        """The rules, with the first way of each choice that is still open."""
        ways = (rule.ways[0] if isinstance(rule, Either) else (rule,) for rule in self.rules)
        return tuple(chain.from_iterable(ways))

    @property
    def memory(self) -> Iterator[tuple[str, ...]]:
        """The names in memory that each rule fills."""
        return (_memory(rule) for rule in self.plain)

    def bind(self, disk_names: Iterable[str]) -> "Rules":
        """The same rules with the names of this checkpoint, so that saving gives them back.

        The prefix goes if the checkpoint has none, and changes if it has another; the copy of a
        tied head stays if it has one; of several ways to hold the same tensors the one that is
        there is kept.
        """
        names = frozenset(disk_names)
        options = (
            tuple(_fitting(_moved(rule, self.prefix, place), names) for rule in self.rules)
            for place in (self.prefix, "", *self.aliases)
        )
        best = max(options, key=lambda ways: sum(_held(way, names) for way in ways))
        copied = self.tied_head is not None and self.tied_head.disk in names
        return replace(self, rules=tuple(chain.from_iterable(best)), head_copied=copied)

    def scaled(self, disk_names: Iterable[str], block: tuple[int, int] | None) -> "Rules":
        """The rules of a checkpoint in which linear maps may be FP8 numbers beside their scales.

        `X.weight` with a `weight_scale_inv` on disk is `X.packed` and `X.scales` in memory; `block`
        says how many rows and columns share a scale (None: all of a matrix do).

        Raises: CheckpointError if maps joined in one tensor share a scale.
        """
        names = frozenset(disk_names)
        found: list[Rule | Stack] = []
        for rule in self.plain:
            packed = any(f"{name}{_SCALES}" in names for name in rule.names)
            found += _scaled(rule, block) if packed else (rule,)
        return replace(self, rules=tuple(found), ignorable=(*self.ignorable, _ACTIVATION_SCALES))

    def expanded(self) -> "Rules":
        """The rules of such a checkpoint once its weights are written as plain numbers again."""
        kept = (rule for rule in self.plain if not _memory(rule)[0].endswith(".scales"))
        return replace(self, rules=tuple(_renamed(rule, ".packed", ".weight") for rule in kept))

    def account(self, disk_names: Iterable[str]) -> Account:
        """What a checkpoint with these names lacks, and what it has that nothing reads."""
        names = frozenset(disk_names)
        wanted = tuple(name for rule in self.plain for name in rule.names)
        known = {*wanted} | ({self.tied_head.disk} if self.tied_head is not None else set())
        found = {name: self._ignorable(name, names) for name in sorted(names - known)}
        ignored = {name: entry for name, entry in found.items() if entry is not None}
        return Account(
            missing=tuple(name for name in wanted if name not in names),
            unexpected=tuple(name for name in found if name not in ignored),
            ignored=ignored,
        )

    def kept(self, disk_names: Iterable[str]) -> tuple[str, ...]:
        """The names of tensors that no rule reads, but that belong in a copy of the checkpoint."""
        ignored = self.account(disk_names).ignored
        return tuple(name for name, entry in ignored.items() if entry.kept)

    def _ignorable(self, name: str, names: frozenset[str]) -> Ignorable | None:
        bare = name.removeprefix(self.prefix)
        for entry in self.ignorable:
            there = entry.beside is None or {entry.beside, self.prefix + entry.beside} & names
            if there and re.fullmatch(entry.pattern, bare):
                return entry
        return None

    def check(self, disk_names: Iterable[str], where: str) -> None:
        """Refuse a checkpoint that lacks a tensor, or holds one that nothing reads.

        Raises: CheckpointError that names them.
        """
        account = self.account(disk_names)
        found = []
        if account.missing:
            found.append(f"missing {_listed(account.missing)}")
        if account.unexpected:
            found.append(f"unexpected {_listed(account.unexpected)}")
        if found:
            raise CheckpointError(
                f"{where}: {'; '.join(found)}; the weights do not belong to this config.json"
            )

    def to_disk(self, read: Read) -> Iterator[tuple[str, Any]]:
        """Every tensor as it is on disk, one at a time, from `read(name in memory)`."""
        for rule in self.plain:
            yield from rule.to_disk(read).items()
        if self.tied_head is not None and self.head_copied:
            yield from self.tied_head.to_disk(read).items()


_SCALES = "_scale_inv"  # added to the name of the weight
_ACTIVATION_SCALES = Ignorable(
    pattern=r".+\.activation_scale",
    reason="how a GPU may round what a map reads; here nothing is rounded",
    kept=True,
)


def _scaled(rule: Rule | Stack, block: tuple[int, int] | None) -> tuple[Rule | Stack, ...]:
    """The rule of the numbers, and that of their scales."""
    numbers, scales = (_renamed(rule, ".weight", name) for name in (".packed", ".scales"))
    if isinstance(scales, Stack):
        return numbers, replace(scales, disk=tuple(f"{name}{_SCALES}" for name in scales.disk))
    scales = replace(scales, disk=f"{scales.disk}{_SCALES}")
    if len(scales.memory) == 1 and not scales.transposed:
        return numbers, replace(scales, sizes=None)
    height, sizes = (0 if block is None else block[0]), scales.sizes or ()
    if not height or scales.transposed or scales.groups > 1 or any(n % height for n in sizes):
        raise CheckpointError(
            f"{scales.disk}: not each of {', '.join(scales.memory)} has scales of its own there; "
            "load the checkpoint it was made from"
        )
    return numbers, replace(scales, sizes=tuple(size // height for size in sizes))


def _memory(rule: Rule | Stack) -> tuple[str, ...]:
    return rule.memory if isinstance(rule, Rule) else (rule.memory,)


def _renamed(rule: Rule | Stack, end: str, new: str) -> Rule | Stack:
    """The rule with another ending of its names in memory."""
    names = (name.removesuffix(end) + new if name.endswith(end) else name for name in _memory(rule))
    if isinstance(rule, Stack):
        return replace(rule, memory=next(names))
    return replace(rule, memory=tuple(names))


def _held(way: tuple[Rule | Stack, ...], names: frozenset[str]) -> int:
    return sum(name in names for rule in way for name in rule.names)


def _fitting(rule: Rule | Stack | Either, names: frozenset[str]) -> tuple[Rule | Stack, ...]:
    """The first of the ways that this checkpoint holds most of."""
    if isinstance(rule, Either):
        return max(rule.ways, key=lambda way: _held(way, names))
    return (rule,)


def _moved(rule: Rule | Stack | Either, prefix: str, place: str) -> Rule | Stack | Either:
    """The rule with `place` in the place of `prefix`."""

    def renamed(name: str) -> str:
        return place + name.removeprefix(prefix) if name.startswith(prefix) else name

    match rule:
        case Rule(disk=disk):
            return replace(rule, disk=renamed(disk))
        case Stack(disk=disks):
            return replace(rule, disk=tuple(renamed(disk) for disk in disks))
        case Either(ways=ways):
            moved = (tuple(cast("Any", _moved(r, prefix, place)) for r in way) for way in ways)
            return Either(tuple(moved))


class DiskPart(NamedTuple):
    """The place of a linear map of ours in the module tree that transformers builds."""

    name: str  # of the module, such as "transformer.h.0.attn.c_attn"
    part: int  # which of its `parts` blocks of outputs
    parts: int
    transposed: bool
    groups: int = 1  # the blocks follow each other so many times over
    experts: bool = False  # a bare parameter of all experts, [E, out, in]
    older: str | None = None  # the module's name in files, where transformers has renamed it


def disk_linears(rules: Rules) -> dict[str, DiskPart]:
    """What an adapter can name, by names in memory: linear maps, experts, and what has a weight.

    Experts are named as transformers has them in memory, all in one parameter, however files hold
    them; a module that it renamed, by the way that its choice lists last. Experts of which it
    expects inputs and outputs in the order that ours do not have (Llama 4) have no place.
    """
    found = {}
    for rule in rules.plain:
        if not isinstance(rule, Rule) or rule.axis or not rule.disk.endswith(".weight"):
            continue
        for part, name in enumerate(rule.memory):
            found[name.removesuffix(".weight")] = _disk_part(rule, part)
    for choice in rules.rules:
        ways = choice.ways if isinstance(choice, Either) else ((choice,),)
        for rule in (rule for way in ways for rule in way if isinstance(rule, Rule)):
            known = rule.disk.endswith(_EXPERTS) and "feed_forward." not in rule.disk
            if rule.axis and known:
                for part, name in enumerate(rule.memory):
                    found[name.removesuffix(".weight")] = _disk_part(rule, part)
            elif not rule.axis and rule.disk.endswith(".weight") and rule not in ways[0]:
                name, new = rule.memory[0].removesuffix(".weight"), _disk_part(rule, 0)
                older = found[name].name
                if not new.name.endswith(f".{older}"):  # renamed, and not just put under a prefix
                    found[name] = new._replace(older=older)
    return found


_EXPERTS = (".experts.gate_up_proj", ".experts.up_proj", ".experts.down_proj")


def _disk_part(rule: Rule, part: int) -> DiskPart:
    name = rule.disk.removesuffix(".weight")
    return DiskPart(name, part, len(rule.memory), rule.transposed, rule.groups, bool(rule.axis))


def weight(
    disk: str, *memory: str, bias: bool = False, transposed: bool = False
) -> tuple[Rule, ...]:
    """The rules of a module's weight and, where it has one, its bias."""
    rules = (Rule(f"{disk}.weight", tuple(f"{name}.weight" for name in memory), transposed),)
    if bias:
        rules += (Rule(f"{disk}.bias", tuple(f"{name}.bias" for name in memory)),)
    return rules


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

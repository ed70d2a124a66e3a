"""Tensor names on disk <-> tensor names in memory, both ways and bit for bit.

A rule takes one tensor on disk to one tensor in memory, or to several that are stacked in it.
Nothing is computed: a rule transposes and cuts, and its inverse joins and transposes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ardor.errors import CheckpointError

_value = dataclass(frozen=True, kw_only=True, slots=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor on disk and what it is in memory: equal parts of its first axis, in order."""

    disk: str
    memory: tuple[str, ...]
    transposed: bool = False  # on disk as [in, out] (GPT-2's Conv1D); in memory as [out, in]

    def shapes(self, on_disk: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shape of each part of a tensor whose shape on disk is `on_disk`.

        Raises: CheckpointError if it cannot be cut into equal parts.
        """
        first, *rest = on_disk[::-1] if self.transposed else on_disk
        if first % len(self.memory):
            raise CheckpointError(
                f"{self.disk} of shape {list(on_disk)} does not split into {len(self.memory)} parts"
            )
        return dict.fromkeys(self.memory, (first // len(self.memory), *rest))

    def to_memory(self, tensor: Any) -> dict[str, Any]:
        """Views of `tensor`, by their names in memory."""
        whole = tensor.mT if self.transposed else tensor
        if len(self.memory) == 1:
            return {self.memory[0]: whole}
        size = next(iter(self.shapes(tensor.shape).values()))[0]
        return {name: whole.narrow(0, i * size, size) for i, name in enumerate(self.memory)}

    def to_disk(self, read: Callable[[str], Any]) -> Any:
        """The tensor as it is on disk, from `read(name in memory)`; a view where it can be."""
        parts = [read(name) for name in self.memory]
        whole = parts[0]
        if len(parts) > 1:
            size = whole.shape[0]
            whole = whole.new_empty((size * len(parts), *whole.shape[1:]))
            for i, part in enumerate(parts):
                whole.narrow(0, i * size, size).copy_(part)
        return whole.mT if self.transposed else whole


@_value
class Ignorable:
    """Tensors that checkpoints hold and no result depends on; they are not saved again."""

    pattern: str  # matches the whole name, without the family's prefix
    reason: str


class Account(NamedTuple):
    """Which names fit. All of the first two must be empty for a checkpoint to be whole."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: Mapping[str, str]  # name -> reason


@_value
class Rules:
    """Every tensor of one model. `bind` fits them to the naming that a checkpoint uses."""

    rules: tuple[Rule, ...]
    prefix: str = ""  # in front of most names; checkpoints of the bare body lack it
    tied_head: Rule | None = None  # a second copy of the embedding, which a checkpoint may hold
    head_copied: bool = False  # this checkpoint does: equal on loading, and saved again
    ignorable: tuple[Ignorable, ...] = ()

    def bind(self, disk_names: Iterable[str]) -> "Rules":
        """The same rules with the names of this checkpoint, so that saving gives them back.

        The prefix goes if the checkpoint has none; the copy of a tied head stays if it has one.
        """
        names = frozenset(disk_names)
        bare = tuple(replace(rule, disk=rule.disk.removeprefix(self.prefix)) for rule in self.rules)
        with_prefix = sum(rule.disk in names for rule in self.rules)
        rules = bare if sum(rule.disk in names for rule in bare) > with_prefix else self.rules
        copied = self.tied_head is not None and self.tied_head.disk in names
        return replace(self, rules=rules, head_copied=copied)

    def account(self, disk_names: Iterable[str]) -> Account:
        """What a checkpoint with these names lacks, and what it has that nothing reads."""
        names = frozenset(disk_names)
        known = {rule.disk for rule in self.rules}
        if self.tied_head is not None:
            known.add(self.tied_head.disk)
        ignored = {}
        for name in sorted(names - known):
            for entry in self.ignorable:
                if re.fullmatch(entry.pattern, name.removeprefix(self.prefix)):
                    ignored[name] = entry.reason
        return Account(
            missing=tuple(rule.disk for rule in self.rules if rule.disk not in names),
            unexpected=tuple(sorted(names - known - ignored.keys())),
            ignored=ignored,
        )

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

    def to_disk(self, read: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
        """Every tensor as it is on disk, one at a time, from `read(name in memory)`."""
        for rule in self.rules:
            yield rule.disk, rule.to_disk(read)
        if self.tied_head is not None and self.head_copied:
            yield self.tied_head.disk, self.tied_head.to_disk(read)


class DiskPart(NamedTuple):
    """The place of a linear map of ours in the module tree that transformers builds."""

    name: str  # of the module, such as "transformer.h.0.attn.c_attn"
    part: int  # which of its `parts` equal blocks of outputs
    parts: int
    transposed: bool


def disk_linears(rules: Rules) -> dict[str, DiskPart]:
    """What an adapter can name, by names in memory: the linear maps and the embedding."""
    return {
        name.removesuffix(".weight"): DiskPart(
            rule.disk.removesuffix(".weight"), part, len(rule.memory), rule.transposed
        )
        for rule in rules.rules
        for part, name in enumerate(rule.memory)
        if name.endswith("_proj.weight") or name in ("lm_head.weight", "embed_tokens.weight")
    }


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

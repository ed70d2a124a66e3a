"""Which device holds which module: sizes in, a map out. Nothing here asks a device.

The maps are those of transformers, name for name; where they are not, tests/parallel says why.

Source: transformers 5.23, integrations/accelerate.py: get_balanced_memory, infer_auto_device_map.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import groupby
from typing import Any

from ardor.errors import ConfigError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
CPU, DISK = "cpu", "disk"
ORDER = ("mps", CPU, DISK)  # after the accelerators, which are numbers

Device = int | str
"""The index of an accelerator, "mps", "cpu" or "disk"."""
Memory = dict[Device, int]
"""The bytes that may lie on each device, in the order in which devices are filled."""

_UNITS = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3}


@dataclass(frozen=True, eq=False)
class Node:
    """A module, or a tensor that stands for itself, by its whole dotted name.

    A tensor that is tied to an earlier one counts no bytes.
    """

    name: str
    children: tuple["Node", ...] = ()  # modules
    parameters: tuple["Node", ...] = ()  # of its own
    buffers: tuple["Node", ...] = ()  # of its own
    whole: bool = False  # on one device, whatever it holds
    bytes: int = 0  # of a tensor

    @cached_property
    def size(self) -> int:
        """Bytes of everything within."""
        parts = (*self.children, *self.parameters, *self.buffers)
        return self.bytes + sum(part.size for part in parts)

    @property
    def divisible(self) -> bool:
        return bool(self.children) and not self.whole

    def modules(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            yield from child.modules()

    def holds(self, tensor: str) -> bool:
        return tensor == self.name or tensor.startswith(f"{self.name}.") or not self.name


Ties = Sequence[frozenset[str]]
"""Groups of names of tensors that are one."""


def parse_size(given: int | str, where: str = "max_memory") -> int:
    """Bytes of 1000, "10GiB", "10GB" or, in bits, "10Gb".

    Raises: ConfigError for anything else.
    """
    text = str(given).strip()
    unit = next((unit for unit in _UNITS if text.upper().endswith(unit)), "")
    try:
        size = int(float(text[: -len(unit)]) * _UNITS[unit]) if unit else int(text)
    except (ValueError, OverflowError):
        size = -1
    if size < 0 or isinstance(given, bool):
        raise ConfigError(
            f"{where}: {given!r} is no amount of memory; give bytes, or a text such as 10GiB"
        )
    return size // 8 if len(unit) == 2 and text.endswith("b") else size


def allowance(given: Mapping[Any, int | str]) -> Memory:
    """`max_memory` as bytes, in the order in which devices are filled; only what is named is used.

    Raises: ConfigError for a device or an amount that is none.
    """
    found: Memory = {}
    for key, amount in given.items():
        device = int(key) if str(key).isdecimal() else key
        number = isinstance(device, int) and not isinstance(key, bool) and device >= 0
        if not number and device not in ORDER:
            raise ConfigError(
                f"max_memory: {key!r} is no device; name accelerators by number (0, 1), and "
                f"{', '.join(ORDER)}"
            )
        found[device] = parse_size(amount, f"max_memory of {key}")
    if not found:
        raise ConfigError("max_memory is empty; name at least one device, or leave it out")
    numbers = sorted(device for device in found if isinstance(device, int))
    return {device: found[device] for device in (*numbers, *ORDER) if device in found}


def device_map(
    root: Node, strategy: str, memory: Memory, ties: Ties = (), *, measured: bool = False
) -> dict[str, Device]:
    """Module -> device, by one of STRATEGIES, of modules as large as lie on one device.

    `measured`: the memory is what is free, not what the user allows; a lone accelerator then keeps
    a tenth of its own for what is computed.
    """
    assert strategy in STRATEGIES, strategy
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0"
        memory = balanced(root, memory, low_zero=low_zero, measured=measured)
    return collapsed(allocate(root, memory, ties))


def balanced(
    root: Node, memory: Memory, *, low_zero: bool = False, measured: bool = False
) -> Memory:
    """Less memory for all accelerators but the last, so that each gets an equal share.

    With `low_zero` the first gets only what the others cannot hold.
    """
    limits = dict(memory)
    usable = [device for device in limits if device not in (CPU, DISK) and limits[device] > 0]
    numbers = [device for device in usable if isinstance(device, int)]
    if not usable:
        return limits
    if len(usable) == 1:
        low_zero = False
        if measured and numbers:
            limits[numbers[0]] = int(limits[numbers[0]] * 0.9)
    share = root.size // (len(usable) - 1 if low_zero else len(usable)) + _slack(root)
    for device in numbers[:-1]:
        if not (low_zero and device == numbers[0]):
            limits[device] = min(share, limits[device])
    if low_zero and numbers:
        others = sum(limits[device] for device in numbers[1:])
        limits[numbers[0]] = min(max(0, root.size - others), limits[numbers[0]])
    return limits


def _slack(root: Node) -> int:
    """What a share may exceed the mean by, as modules are no sand."""
    modules = list(root.modules())
    whole = (module.size for module in modules if module.whole)
    own = (sum(t.size for t in (*m.parameters, *m.buffers)) for m in modules if m.name)
    return int(1.25 * max(*whole, *own, 0, 0))


def allocate(root: Node, memory: Memory, ties: Ties = ()) -> dict[str, Device]:
    """Fill one device after the other, in the order of the modules, and the disk with the rest.

    The first accelerator and the CPU keep room for the largest module still to come, as it may
    have to be fetched there for its turn. Tied modules lie together.
    """
    return _Filling(root, memory, ties).run()


class _Filling:
    """The state of `allocate`: what waits for a place, and the device that is being filled."""

    def __init__(self, root: Node, memory: Memory, ties: Ties):
        self.ties = ties
        self.queue = [*root.parameters, *root.children, *root.buffers]
        self.devices = [*memory, *(() if DISK in memory else (DISK,))]
        self.limits = {**memory, DISK: math.inf}
        first = [device for device in self.devices if device not in (CPU, DISK)][:1]
        self.reserving = ["mps"] if "mps" in self.devices else [*first, CPU]
        self.used = dict.fromkeys(self.devices, 0)
        self.found: dict[str, Device] = {}
        self.largest = _Largest(self.queue)

    def run(self) -> dict[str, Device]:
        current = 0
        while self.queue:
            item = self.queue.pop(0)
            self.largest.leave(item, self.queue)
            device = self.devices[current]
            reserve = self.largest.size if device in self.reserving else 0
            room = self.limits[device] - reserve - self.used[device]
            partners = self._partners(item)
            if item.size + sum(partner.size for partner in partners) <= room:
                self._put(item, partners, device)
                continue
            parts = self._divided(item, partners, fits=item.size <= room)
            if parts is None:
                self.used[device] += reserve
                current += 1
                self.queue.insert(0, item)
            else:
                self.queue = parts
                self.largest = _Largest([part for part in parts if not part.bytes])
        return self.found

    def _partners(self, item: Node) -> list[Node]:
        """What waits and holds a tensor that is tied to one of `item`."""
        outside = [
            name
            for group in self.ties
            if any(map(item.holds, group))
            for name in group
            if not item.holds(name)
        ]
        return [other for other in self.queue if any(map(other.holds, outside))]

    def _put(self, item: Node, partners: list[Node], device: Device) -> None:
        for node in (item, *partners):
            self.found[node.name] = device
            self.used[device] += node.size
        self.queue = [other for other in self.queue if other.name not in self.found]

    def _divided(self, item: Node, partners: list[Node], *, fits: bool) -> list[Node] | None:
        """The queue with a partner, or else the item itself, in parts; None if neither has any."""
        if fits:
            for partner in partners:
                if partner.divisible:
                    place = self.queue.index(partner)
                    rest = self.queue[place + 1 :]
                    return [item, *self.queue[:place], *_parts(partner), *rest]
        return [*_parts(item), *self.queue] if item.divisible else None


def _parts(node: Node) -> list[Node]:
    return [*node.parameters, *node.children]


class _Largest:
    """The size of the largest module that cannot be divided, among those that wait."""

    def __init__(self, queue: Sequence[Node]):
        self.size, self.names = 0, []
        self._find(queue)

    def leave(self, item: Node, queue: Sequence[Node]) -> None:
        """`item` no longer waits."""
        self.names = [name for name in self.names if not item.holds(name)]
        if not self.names:
            self._find([node for node in queue if not node.bytes])

    def _find(self, queue: Sequence[Node]) -> None:
        sizes = {leaf.name: leaf.size for node in queue for leaf in _undivided(node)}
        self.size = max(sizes.values(), default=0)
        self.names = [name for name, size in sizes.items() if size == self.size]


def _undivided(node: Node) -> Iterator[Node]:
    if not node.divisible:
        yield node
        return
    for child in node.children:
        yield from _undivided(child)


def collapsed(found: Mapping[str, Device], prefix: str = "") -> dict[str, Device]:
    """The same map with one entry for a module whose parts, two or more, lie together."""
    if len(found) > 1 and len({*found.values()}) == 1:
        return {prefix: next(iter(found.values()))}
    if len(found) <= 1:
        return dict(found)
    depth = prefix.count(".") + 2 if prefix else 1

    def part(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    merged: dict[str, Device] = {}
    for name, group in groupby(sorted(found, key=part), key=part):
        merged |= collapsed({key: found[key] for key in group}, name)
    # In the order of the modules, which sorting has lost.
    rank = {key: place for place, key in enumerate(found)}
    first = {n: min(r for k, r in rank.items() if _within(k, n)) for n in merged}
    return dict(sorted(merged.items(), key=lambda entry: first[entry[0]]))


def expanded(
    given: Mapping[str, Device], parts: Sequence[str], whole: Sequence[str], ties: Ties = ()
) -> dict[str, Device]:
    """The device of each of `parts`, from a user's map of modules at any level.

    The longest name counts. `whole` are the parts that have modules of their own within.

    Raises: ConfigError for a name that is no module, a module within one of `whole`, a part that
    nothing covers, or tied parts in two places.
    """
    for name in given:
        if any(_within(part, name) for part in parts) or name.endswith("rotary_emb"):
            continue  # rotary tables are a module elsewhere; here they are made as they are needed
        if layer := next((part for part in whole if _within(name, part)), None):
            raise ConfigError(
                f"device_map: {name!r} is inside of {layer}, and a layer lies on one device, as "
                f"its parts add to one stream; give {layer!r}"
            )
        known = [prefix for part in parts for prefix in _prefixes(part)]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(parts)}"
        raise ConfigError(f"device_map: {name!r} is no module of this model; {hint}")
    found = {}
    for part in parts:
        covering = [name for name in given if _within(part, name)]
        if not covering:
            raise ConfigError(
                f"device_map says nothing of {part}; add it, a module around it, or '' for all "
                "that is not named"
            )
        found[part] = given[max(covering, key=len)]
    for group in ties:
        where = {part: found[part] for part in parts if any(_within(t, part) for t in group)}
        if len({*where.values()}) > 1:
            said = " and ".join(f"{part} on {device}" for part, device in where.items())
            raise ConfigError(
                f"device_map puts {said}, but they are tied: one tensor, which lies in one place"
            )
    return found


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]

"""The parts of a decoder on the devices that a device_map gives them, filled one by one.

Names in a map are those of transformers' modules ("model.layers.3"), as users write and read them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor import __version__
from ardor.arch.causal import Devices
from ardor.arch.decoder import Decoder
from ardor.errors import ConfigError
from ardor.families.rules import Rule, Rules, Stack
from ardor.files.mapped import MappedFile, open_made, write_made
from ardor.files.weights import WeightFiles
from ardor.parallel.offload import Pages, Part, Turns
from ardor.parallel.placement import (
    CPU,
    DISK,
    STRATEGIES,
    Device,
    Memory,
    Node,
    Ties,
    allowance,
    device_map,
    expanded,
)

KBIT = "kbit"
PACKED = (".packed", ".scales", ".blocks")  # endings of names of tensors that are never cast
RENAMED = {"embed_out": "lm_head"}  # modules that transformers 5 calls otherwise than their files
Accelerators = Mapping[Device, torch.device]


@dataclass(frozen=True)
class Spread:
    """How a model is to be spread over devices, as users say it."""

    device_map: str | Mapping[str, Any]  # one of STRATEGIES, or devices by module
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: Path | None = None
    # What they are numbered by; a pretended topology gives other devices, as a test does.
    accelerators: Accelerators = field(default_factory=lambda: accelerators())

    @property
    def device(self) -> torch.device:
        """Where computing begins, before it is known what lies where."""
        if isinstance(self.device_map, str):
            usable = allowance(self.max_memory) if self.max_memory else self.accelerators
        else:
            usable = [self.key(value) for value in self.device_map.values()]
        return next((self.accelerators[d] for d in usable if d in self.accelerators), _HOST)

    def key(self, given: Any, setting: str = "device_map") -> Device:
        """A device as maps name it; `setting` is where it was given.

        Raises: ConfigError if this machine lacks it.
        """
        text = str(given)
        if text in (CPU, DISK):
            return text
        number = text.rpartition(":")[2] if ":" in text else text
        device = int(number) if number.isdecimal() else 0 if text == "cuda" else text
        if isinstance(given, bool) or device not in self.accelerators:
            there = ", ".join(str(name) for name in (*self.accelerators, CPU, DISK))
            raise ConfigError(
                f"{setting}: {given!r} is not a device of this machine; it has {there}"
            )
        return device


_HOST = torch.device("cpu")


def accelerators() -> dict[Device, torch.device]:
    """The accelerators of this machine, by their names in maps."""
    found: dict[Device, torch.device] = {
        number: torch.device("cuda", number) for number in range(torch.cuda.device_count())
    }
    return found or ({"mps": torch.device("mps")} if torch.backends.mps.is_available() else {})


def requested(
    given: str | int | torch.device | Mapping[str, Any] | None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> torch.device | Spread:
    """What a device_map asks for: one device, or that a model is spread.

    Raises: ConfigError for a device that this machine lacks, or max_memory with nothing to limit.
    """
    if isinstance(given, Mapping) and given.keys() == {""} and given[""] != DISK:
        given = given[""]
    folder = None if offload_folder is None else Path(offload_folder)
    if isinstance(given, Mapping) or (isinstance(given, str) and given in (*STRATEGIES, DISK)):
        if max_memory is not None and given not in STRATEGIES:
            raise ConfigError("max_memory limits a strategy; leave it out, or give device_map=auto")
        return Spread({"": DISK} if given == DISK else given, max_memory, folder)
    if max_memory is not None:
        raise ConfigError(f"max_memory is nothing without device_map=auto; found {given!r}")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if given == KBIT:  # each process has the model on its own device
        given = f"cuda:{rank}" if torch.cuda.is_available() else None
    if given == "cuda":
        given = f"cuda:{rank}"
    return _device(given)


def _device(given: str | int | torch.device | None) -> torch.device:
    try:
        device = torch.device("cpu" if given is None else given)
        if device.type == "meta":
            raise RuntimeError
        torch.empty(0, device=device)
    # An AssertionError is how a torch without CUDA answers.
    except (RuntimeError, TypeError, AssertionError):
        raise ConfigError(
            f"device_map={given!r} is not a device of this machine; give one such as cpu or "
            f"cuda:0, one of {', '.join(STRATEGIES)}, or a device for each module"
        ) from None
    return device


@dataclass(frozen=True)
class Placement:
    """Which part of a model lies where, and why."""

    map: dict[str, Device]  # as transformers would give it
    parts: tuple[Part, ...]  # of our decoder, in the order in which they compute
    why: str
    pages: dict[int, Pages]  # by the address of a tensor that is mapped from a file

    def start(self, decoder: Decoder) -> Turns:
        """Have the filled decoder compute so."""
        for part in self.parts:  # an adapter came after its weights
            if part.kept == "device":
                decoder.get_submodule(part.name).to(part.device)
        layers = tuple(part.device for part in self.parts if part.name.startswith("layers."))
        decoder.devices = Devices(self.parts[0].device, layers)
        head = "embed_tokens" if decoder.spec.tied else "lm_head"
        return Turns(decoder, self.parts, self.pages, head=head)

    def summary(self) -> str:
        """For people: "model.embed_tokens, model.layers.0 to 11 on 0, model.layers.12 on disk"."""
        found = []
        for device, group in groupby(self.map.items(), key=lambda entry: entry[1]):
            names = [name or "all" for name, _ in group]
            runs = [[*run] for _, run in groupby(names, key=_stem)]
            shown = [
                run[0] + (f" to {run[-1].rpartition('.')[2]}" if run[1:] else "") for run in runs
            ]
            found.append(f"{', '.join(shown)} on {device}")
        return f"{', '.join(found)} ({self.why})"


def _stem(name: str) -> str:
    """What numbered modules have in common."""
    stem, _, last = name.rpartition(".")
    return stem if last.isdecimal() else name


@dataclass
class Filling:
    """An empty decoder and what it takes to fill a part of it."""

    decoder: Decoder
    files: WeightFiles
    rules: Rules  # bound to the names in the files
    names: Rules  # as transformers names them
    dtype: torch.dtype | None  # None: as stored
    fill: Callable[[Sequence[Rule | Stack]], None]
    put: Callable[[str, Tensor], None]
    quantize: Callable[[nn.Module], object] | None
    quantization: str | None

    def __post_init__(self) -> None:
        self.parts = [*dict.fromkeys(part_of(rule) for rule in self.rules.plain)]
        # What a quantized layer holds, by the spec of the layer; without memory.
        self._templates: dict[Any, nn.Module] = {}
        self._mapped: dict[Path, MappedFile] = {}

    def part_rules(self, part: str) -> list[Rule | Stack]:
        return [rule for rule in self.rules.plain if part_of(rule) == part]

    def size(self, part: str) -> int:
        """Bytes of the part as it will be held."""
        if self.quantize is not None and part.startswith("layers."):
            return sum(tensor.nbytes for tensor in _state(self._template(part)).values())
        total = 0
        for rule in self.part_rules(part):
            held = self._held(rule)
            shapes = rule.shapes(self.files.shape).values()
            total += sum(torch.Size(shape).numel() for shape in shapes) * held.itemsize
        return total

    def _template(self, part: str) -> nn.Module:
        """A layer of the same kind as it will be held: that shows when one is made."""
        layer: Any = self.decoder.get_submodule(part)
        if layer.spec not in self._templates:
            self._templates[layer.spec] = deepcopy(self.finish(part)).to("meta")
        return self._templates[layer.spec]

    def finish(self, part: str) -> nn.Module:
        """The part with its weights, as it will be held, in host memory."""
        module = self.decoder.get_submodule(part)
        if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            return module
        self.fill(self.part_rules(part))
        if self.quantize is not None and part.startswith("layers."):
            self.quantize(_alone(part, module))
        return module.to(dtype=self.dtype)

    def _held(self, rule: Rule | Stack) -> torch.dtype:
        """The dtype in memory of what a rule reads: numbers in a packed format keep theirs."""
        stored, name = self.files.dtype(rule.names[0]), memory_of(rule)
        packed = name.endswith(PACKED) or not stored.is_floating_point
        return stored if packed or self.dtype is None else self.dtype

    def stored_so(self, part: str) -> bool:
        """Whether every tensor of the part is in the files as it will be in memory."""
        if self.quantize is not None and part.startswith("layers."):
            return False
        return all(self._stored_so(rule) for rule in self.part_rules(part))

    def _stored_so(self, rule: Rule | Stack) -> bool:
        if isinstance(rule, Stack) or rule.transposed or len(rule.memory) > 1:
            return False
        stored, file = self.files.dtype(rule.disk), self.files.file(rule.disk)
        return (
            self._held(rule) == stored
            and file.suffix == ".safetensors"
            and self.mapped(file).aligned(rule.disk)
        )

    def mapped(self, file: Path) -> MappedFile:
        if file not in self._mapped:
            self._mapped[file] = MappedFile(file)
        return self._mapped[file]

    def keep_on_disk(self, part: str, folder: Path | None) -> Iterator[tuple[int, Pages]]:
        """Fill the part with tensors mapped from files: the checkpoint's, or one that is written.

        What was written before is used again if it is whole and was made from the same.
        """
        if self.stored_so(part):
            for rule in self.part_rules(part):
                assert isinstance(rule, Rule)
                file = self.mapped(self.files.file(rule.disk))
                yield self._map(file, rule.disk, rule.memory[0])
            return
        assert folder is not None
        path, source = folder / f"{part}.safetensors", self._source(part)
        made = open_made(path, source)
        if made is None:
            write_made(path, _state(self.finish(part), f"{part}."), source)
            made = open_made(path, source)
            assert made is not None
        elif self.quantize is not None and part.startswith("layers."):
            self.decoder.set_submodule(part, deepcopy(self._template(part)))
        for name in made.names():
            if name.startswith(f"{part}."):
                yield self._map(made, name, name)

    def _map(self, file: MappedFile, name: str, ours: str) -> tuple[int, Pages]:
        tensor, region = file.tensor(name)
        self.put(ours, tensor)
        return tensor.data_ptr(), region

    def _source(self, part: str) -> str:
        """What a file of the part is made from: another answer means that it must be made anew."""
        rules = self.part_rules(part)
        files = {self.files.file(name) for rule in rules for name in rule.names}
        stats = {str(file.resolve()): file.stat() for file in sorted(files)}
        return json.dumps(
            {
                "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
                "tensors": [[*rule.names] for rule in rules],
                "dtype": str(self.dtype),
                "quantization": self.quantization,
                "ardor": __version__,
            },
            sort_keys=True,
        )


def place(spread: Spread, filling: Filling) -> Placement:
    """Decide which part lies where, and fill each with its weights there.

    Raises: ConfigError for a map or a memory that does not fit the model, CheckpointError if the
    offload folder cannot be written.
    """
    theirs = module_names(filling.names)
    decided, why = _decided(spread, filling, theirs)
    homes = expanded(decided, [*theirs.values()], _layers(theirs), ties_of(filling.names))
    parts = tuple(_parts(spread, {part: homes[theirs[part]] for part in filling.parts}))
    changed = [p.name for p in parts if p.kept == DISK and not filling.stored_so(p.name)]
    if changed and spread.offload_folder is None:
        raise ConfigError(
            f"{theirs[changed[0]]} is to be kept on disk, where it is not as it will be in memory "
            "(quantized, in another dtype or joined otherwise), so it must be written: give "
            "offload_folder (--offload-folder) a directory on a disk with room for it"
        )
    pages: dict[int, Pages] = {}
    for part in parts:
        if part.kept == DISK:
            pages |= filling.keep_on_disk(part.name, spread.offload_folder)
            continue
        module = filling.finish(part.name)
        if part.kept == "device":
            module.to(part.device)
        elif part.device.type == "cuda":
            module._apply(lambda tensor: tensor.pin_memory())  # or it is copied twice
    return Placement(decided, parts, why, pages)


def _decided(
    spread: Spread, filling: Filling, theirs: Mapping[str, str]
) -> tuple[dict[str, Device], str]:
    if not isinstance(spread.device_map, str):
        return {name: spread.key(value) for name, value in spread.device_map.items()}, "as asked"
    measured = spread.max_memory is None
    memory = measure(spread.accelerators) if measured else allowance(spread.max_memory or {})
    for device in memory:
        spread.key(device, "max_memory")
    root = tree({name: filling.size(part) for part, name in theirs.items() if part}, theirs)
    found = device_map(root, spread.device_map, memory, ties_of(filling.names), measured=measured)
    amounts = ", ".join(f"{device}: {size / 2**30:.1f} GiB" for device, size in memory.items())
    kind = "free" if measured else "allowed"
    return found, f"{spread.device_map}: {root.size / 2**30:.1f} GiB of weights, {kind} {amounts}"


def _parts(spread: Spread, homes: Mapping[str, Device]) -> Iterator[Part]:
    used = [home for home in homes.values() if home not in (CPU, DISK)]
    # What is kept elsewhere computes on the first accelerator, which has room for it.
    main = spread.accelerators[used[0]] if used else _HOST
    for name, home in homes.items():
        if home == DISK:
            yield Part(name, main, "disk")
        elif home == CPU:
            yield Part(name, main, "cpu" if used else "device")
        else:
            yield Part(name, spread.accelerators[home])


def part_of(rule: Rule | Stack) -> str:
    """The part of our decoder that a rule fills: a layer, or a module beside the layers."""
    names = memory_of(rule).split(".")
    return ".".join(names[: 2 if names[0] in ("layers", "token_inputs") else 1])


def memory_of(rule: Rule | Stack) -> str:
    """The first name in memory that a rule fills."""
    return rule.memory if isinstance(rule.memory, str) else rule.memory[0]


def module_names(rules: Rules) -> dict[str, str]:
    """Our part -> its module as transformers names it; "" for a head that is tied."""
    found: dict[str, str] = {}
    for rule in rules.plain:
        part, disk = part_of(rule), rule.names[0].split(".")
        if part not in found:
            index = part.partition(".")[2] if part.startswith("layers.") else ""
            end = disk.index(index) + 1 if index else len(disk) - 1
            name = ".".join(disk[:end])
            found[part] = RENAMED.get(name, name)
    if rules.tied_head is not None:
        name = rules.tied_head.disk.rpartition(".")[0]
        found[""] = RENAMED.get(name, name)
    return found


def ties_of(rules: Rules) -> Ties:
    """The embedding and the head, where they are one."""
    if rules.tied_head is None:
        return ()
    theirs = module_names(rules)
    return (frozenset(f"{theirs[part]}.weight" for part in ("embed_tokens", "")),)


def _layers(theirs: Mapping[str, str]) -> list[str]:
    return [name for part, name in theirs.items() if part.startswith("layers.")]


def tree(sizes: Mapping[str, int], theirs: Mapping[str, str]) -> Node:
    """The modules around the parts, as transformers nests them, with each part's bytes."""
    layers = {*_layers(theirs)}

    def node(name: str, inside: Sequence[str]) -> Node:
        if name in theirs.values():
            tensor = Node(f"{name}.weight", bytes=sizes.get(name, 0))
            return Node(name, parameters=(tensor,), whole=name in layers)
        depth = name.count(".") + 2 if name else 1
        children: dict[str, list[str]] = {}
        for part in inside:
            children.setdefault(".".join(part.split(".")[:depth]), []).append(part)
        return Node(name, children=tuple(node(child, parts) for child, parts in children.items()))

    return node("", [*theirs.values()])


def measure(accelerators: Accelerators) -> Memory:
    """The bytes that are free on each device; of the CPU's a tenth is left to others."""
    found: Memory = {}
    for name, device in accelerators.items():
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            found[name] = torch.cuda.mem_get_info(device)[0] + unused
        elif device.type == "mps":
            return {name: available()}  # the same memory as the CPU's
    return found | {CPU: int(available() * 0.9)}


def available() -> int:
    """Bytes of host memory that can be had without swapping, in a container no more than its."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        found = min(found, int(limit.read_text()) - int(used.read_text()))
    return max(0, found)


def _alone(part: str, module: nn.Module) -> nn.Module:
    """A model with this layer only, under its own name."""
    root = nn.Module()
    root.layers = nn.ModuleDict({part.partition(".")[2]: module})
    return root


def _state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    held = (*module.named_parameters(), *module.named_buffers())
    return {f"{prefix}{name}": tensor for name, tensor in held}

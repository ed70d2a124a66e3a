"""Quantized weights between files and a decoder: as they arrive, as they came, and back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor.arch.experts import ExpertLinear
from ardor.arch.linear import Linear, place_of
from ardor.errors import CheckpointError, ConfigError
from ardor.families.rules import Rule, Rules, Stack
from ardor.files.json import read_object
from ardor.files.pages import release
from ardor.files.weights import FLOATING, WeightFiles
from ardor.files.yaml import read_yaml
from ardor.quant.bnb4 import LEVELS, STATE, FourBitWeight
from ardor.quant.bnb8 import RowsWeight
from ardor.quant.config import SECTION, Published, Quantization, asked, published
from ardor.quant.experts import QuantizedExperts
from ardor.quant.formats import FORMATS
from ardor.quant.gptq import AWQWeight, GPTQWeight
from ardor.quant.groupwise import GroupWeight
from ardor.quant.linear import (
    DEFAULT_SKIP,
    QuantizedLinear,
    StoredLinear,
    check_skip,
    covers,
)
from ardor.quant.packed import PackedWeight, Rows

Read = Callable[[str], Tensor]
# quant_method -> the ends of names that only a module quantized so has.
MARKS = {
    "bitsandbytes": (*(f".{STATE}{kind}" for kind in LEVELS), ".SCB"),
    "gptq": (".qweight",),
    "awq": (".qweight",),
    "ardor": (".weight_scales",),
}


def settings(quantization: Any) -> Any:
    """A quantization as `asked` takes it: a YAML or JSON file of settings is read."""
    name = str(quantization)
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name)).values
    return read_object(name) if name.endswith(".json") else quantization


class PackedFiles(WeightFiles):
    """The files of a quantized checkpoint as if each packed weight were one tensor, X.weight.

    Its shape is [out, in] and its dtype what it stands for; `packed` gives its value, in the
    memory that the file is mapped to.
    """

    def __init__(self, files: WeightFiles, how: Published):
        self.directory, self.how, self._files = files.directory, how, files
        names = files.names()
        modules = (
            name.removesuffix(mark)
            for name in names
            for mark in MARKS[how.method]
            if name.endswith(mark)
        )
        self._tensors: dict[str, dict[str, str]] = {f"{module}.weight": {} for module in modules}
        self._values: dict[str, PackedWeight] = {}
        self._plain: list[str] = []
        for name in names:
            module, _, end = name.rpartition(".")
            if "weight" in (parts := name.split(".")):  # X.weight.absmax
                at = len(parts) - 1 - parts[::-1].index("weight")
                module, end = ".".join(parts[:at]), ".".join(parts[at:])
            if f"{module}.weight" in self._tensors and end != "bias":
                self._tensors[f"{module}.weight"][end] = name
            else:
                self._plain.append(name)

    def names(self) -> tuple[str, ...]:
        return (*self._tensors, *self._plain)

    @property
    def parts(self) -> frozenset[str]:
        """The names in the files of what packed weights are made of: codes, scales and the like."""
        return frozenset(name for ends in self._tensors.values() for name in ends.values())

    def is_packed(self, name: str) -> bool:
        return name in self._tensors

    def packed(self, name: str) -> PackedWeight:
        """The weight `name` in its own format.

        Raises: CheckpointError if tensors of it are missing or do not fit.
        """
        if name not in self._values:
            found = {end: self._files.read(key) for end, key in self._tensors[name].items()}
            self._values[name] = _value(self.how, found, f"{self.directory}: {name}")
        return self._values[name]

    def file(self, name: str) -> Any:
        return self._files.file(self._first(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.packed(name).shape if self.is_packed(name) else self._files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.packed(name).original_dtype if self.is_packed(name) else self._files.dtype(name)

    def size(self, name: str) -> int:
        """In bytes: of all its tensors."""
        tensors = self._tensors.get(name, {"": name})
        return sum(self._files.size(tensor) for tensor in tensors.values())

    def read(self, name: str) -> Tensor:
        if self.is_packed(name):
            raise CheckpointError(
                f"{self.file(name)}: {name} is quantized ({self.how.name}), which only the linear "
                "maps of layers are held in; load the checkpoint it was made from"
            )
        return self._files.read(name)

    def read_as(self, name: str, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        return self.read(name) if self.is_packed(name) else self._files.read_as(name, dtype, device)

    def first_floating(self) -> torch.dtype | None:
        """Of what is not packed: scales say nothing of the model."""
        plain = (self._files.dtype(name) for name in self._plain)
        return next((dtype for dtype in plain if dtype in FLOATING), None)

    def fit(self, rules: Rules) -> Rules:
        """The rules of the same tensors: a packed weight is [out, in] whatever a plain one is."""

        def fitted(rule: Rule | Stack) -> Rule | Stack:
            if isinstance(rule, Rule) and rule.transposed and self.is_packed(rule.disk):
                return replace(rule, transposed=False)
            return rule

        return replace(rules, rules=tuple(fitted(rule) for rule in rules.plain))

    def _first(self, name: str) -> str:
        return next(iter(self._tensors.get(name, {}).values()), name)


def _value(how: Published, found: Mapping[str, Tensor], name: str) -> PackedWeight:
    if how.method == "gptq":
        return GPTQWeight.from_tensors(found, name, how.bits, how.group, how.less_one)
    if how.method == "awq":
        return AWQWeight.from_tensors(found, name, how.group)
    if how.method == "ardor":
        return GroupWeight.from_tensors(found, name, how.bits, how.group, torch.bfloat16)
    if how.bits == 8:
        return RowsWeight.from_tensors(found, name, threshold=how.threshold)
    return FourBitWeight.from_tensors(found, name)


def opened(
    files: WeightFiles, config: Mapping[str, Any], where: str
) -> tuple[WeightFiles, Published | None]:
    """Files as config.json says that they hold their weights.

    Raises: ConfigError for a kind of quantization that is not read.
    """
    how = published(config, where)
    return (files, None) if how is None else (PackedFiles(files, how), how)


def wanted(quantization: Any, how: Published | None, source: str) -> Quantization | None:
    """What is still to be quantized of a checkpoint that is held as `how` says.

    Raises: ConfigError for another format than the one it is in.
    """
    if how is None:
        return asked(quantization)
    if quantization is None or quantization in ("none", how.name):
        return None
    found = asked(quantization)
    if found is not None and found.format == how.name:
        return None
    raise ConfigError(
        f"{source} is quantized already, as {how.name}; leave quantization out, or load the "
        "checkpoint it was made from"
    )


def require_linears(
    quantized: Sequence[str], quantization: Quantization | None, source: str
) -> None:
    """Raises: ConfigError if something was to be quantized and nothing was."""
    if quantization is not None and not quantized:
        raise ConfigError(
            f"quantization={quantization.format!r}: {source} has no plain linears to quantize; "
            "leave it out"
        )


class Arrival:
    """Where a rule's tensors are linear maps, quantized ones in their places."""

    def __init__(
        self,
        decoder: nn.Module,
        rules: Rules,
        files: WeightFiles,
        quantization: Quantization | None,
        device: torch.device,
    ):
        self.decoder, self.files, self.device = decoder, files, device
        self._skip = (*DEFAULT_SKIP, *(() if quantization is None else quantization.skip))
        self.quantization = quantization
        self.quantized: list[str] = []  # our names of what was, in order
        if quantization is not None:
            disk = [name for rule in rules.plain for name in rule.names]
            ours = [name for name, _ in decoder.named_modules() if name]
            theirs = {".".join(name.split(".")[:end]) for name in disk for end in range(1, 9)}
            check_skip(self._skip, [*ours, *sorted(theirs)])

    @property
    def name(self) -> str | None:
        """Of the format in which linear maps are held, if it is not as tensors of numbers."""
        if isinstance(self.files, PackedFiles):
            return self.files.how.name
        return None if self.quantization is None else str(self.quantization.record())

    @property
    def changes(self) -> bool:
        """Whether it changes any module."""
        return self.name is not None

    def takes(self, rule: Rule | Stack) -> bool:
        """Whether it fills the places of a rule."""
        return self._packed(rule) or self.chosen(rule)

    def take(self, rule: Rule | Stack, read: Read) -> None:
        """Fill the rule's places with quantized maps, one tensor at a time.

        Raises: CheckpointError for a weight that cannot be quantized, or packed ones that are not.
        """
        packed = self._packed(rule)
        if isinstance(rule, Stack) or self._experts(rule):
            self._place_experts(rule, read, packed)
            return
        value = self._held(rule.disk) if packed else self._quantize(rule, read)
        groups, start = rule.groups, 0
        sizes = rule.sizes or (value.shape[0] // len(rule.memory),) * len(rule.memory)
        for name, size in zip(rule.memory, sizes, strict=len(rule.memory) > 1):
            part = Rows(start, size // groups, groups) if len(rule.memory) > 1 else None
            start += size // groups
            self._replace(name, lambda bias, part=part: QuantizedLinear(value, bias, part))

    def finish(self, root: nn.Module) -> None:
        """Quantize the maps of `root` that their file keeps in another packed format."""
        if self.quantization is None:
            return
        for name, module in [*root.named_modules()]:
            skipped = any(covers(entry, name) for entry in self._skip)
            if (
                isinstance(module, StoredLinear)
                and place_of(root, name) == "layers"
                and not skipped
            ):
                weight = module.dequantized()
                value = self._made(weight, weight)
                root.set_submodule(name, QuantizedLinear(value, module.bias))
                self.quantized.append(name)

    def values(self, rule: Rule | Stack, read: Read) -> Iterator[tuple[str, PackedWeight, Tensor]]:
        """(name in files, quantized, as it was) of each weight of a chosen rule, one at a time.

        None for experts in one tensor, which no quantized layout has.
        """
        if isinstance(rule, Rule) and self._experts(rule):
            return
        for name in rule.names:
            tensor = read(name)
            dense = tensor.mT if isinstance(rule, Rule) and rule.transposed else tensor
            yield name, self._made(dense, tensor), dense

    def _packed(self, rule: Rule | Stack) -> bool:
        if not isinstance(self.files, PackedFiles):
            return False
        held = [self.files.is_packed(name) for name in rule.names]
        return all(held) and self._linear(rule)

    def chosen(self, rule: Rule | Stack) -> bool:
        """Whether it is to be quantized: a joined one only if no part of it is skipped."""
        if self.quantization is None or not self._linear(rule):
            return False
        names = [name.removesuffix(".weight") for name in (*_memory(rule), *rule.names)]
        return not any(covers(entry, name) for entry in self._skip for name in names)

    def _linear(self, rule: Rule | Stack) -> bool:
        """Whether every place of it is a weight of a plain linear map in the layers."""
        for name in _memory(rule):
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight":
                return False
            module = self.decoder.get_submodule(owner)
            plain = type(module) in (Linear, ExpertLinear)
            if not plain or place_of(self.decoder, owner) != "layers":
                return False
        return True

    def _experts(self, rule: Rule | Stack) -> bool:
        owner = _memory(rule)[0].removesuffix(".weight")
        return isinstance(self.decoder.get_submodule(owner), ExpertLinear)

    def _held(self, name: str) -> PackedWeight:
        assert isinstance(self.files, PackedFiles)
        return _moved(self.files.packed(name), self.device)

    def _quantize(self, rule: Rule, read: Read) -> PackedWeight:
        tensor = read(rule.disk)
        return self._made(tensor.mT if rule.transposed else tensor, tensor)

    def _made(self, weight: Tensor, source: Tensor) -> PackedWeight:
        assert self.quantization is not None
        value = FORMATS[self.quantization.format](weight.to(self.device))
        release(source)
        if isinstance(value, RowsWeight):
            return replace(value, threshold=self.quantization.threshold)
        return value

    def _place_experts(self, rule: Rule | Stack, read: Read, packed: bool) -> None:
        if isinstance(rule, Stack):
            if packed:
                values = [self._held(name) for name in rule.disk]
            else:
                sources = (read(name) for name in rule.disk)
                values = [self._made(source, source) for source in sources]
            self._replace(rule.memory, lambda bias: QuantizedExperts(values, bias))
            return
        for name, whole in rule.to_memory(read).items():
            values = [self._made(expert.contiguous(), expert) for expert in whole]
            self._replace(
                name, lambda bias, values=values: QuantizedExperts(values, bias, joined=True)
            )

    def _replace(self, name: str, make: Callable[[nn.Parameter | None], nn.Module]) -> None:
        owner = name.removesuffix(".weight")
        dense = self.decoder.get_submodule(owner)
        module = make(None)
        # As it is, on the meta device too: its own rule fills it.
        bias: Any = getattr(dense, "bias", None)
        module.register_parameter("bias", bias)
        self.decoder.set_submodule(owner, module)
        self.quantized.append(owner)


def _moved(value: PackedWeight, device: torch.device) -> PackedWeight:
    moved = {name: tensor.to(device) for name, tensor in value.storage.items()}
    return type(value)(**(value.parts | moved))


def _memory(rule: Rule | Stack) -> tuple[str, ...]:
    return rule.memory if isinstance(rule, Rule) else (rule.memory,)


def to_disk(
    rules: Rules, decoder: nn.Module, read: Read, device: str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as files hold it, packed ones by the layout of their format and on `device`.

    Raises: ConfigError if a part of a joined weight is quantized and another is not, or for
    experts in one tensor, which no quantized layout has.
    """
    for rule in rules.plain:
        modules = _modules(rule, decoder)
        if not any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in modules):
            yield from rule.to_disk(read).items()
            continue
        if len({type(module) for module in modules}) > 1:
            raise ConfigError(
                f"{rule.names[0]} joins weights of which some are quantized and some are not (an "
                "adapter was merged into them); load the model without quantization to save it"
            )
        for name, tensor in _packed_tensors(rule, modules[0]):
            yield name, tensor.to(device)
    if rules.tied_head is not None and rules.head_copied:
        yield from rules.tied_head.to_disk(read).items()


def _packed_tensors(rule: Rule | Stack, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, QuantizedExperts):
        if module.joined:
            raise ConfigError(
                f"{rule.names[0]} holds all experts in one tensor, which no quantized layout has; "
                "give skip_modules=['experts'] to keep them as they are"
            )
        values = [module.weight(index) for index in range(module.count)]
    else:
        assert isinstance(module, QuantizedLinear)
        values = [module.quantized]
    for name, value in zip(rule.names, values, strict=True):
        for end, tensor in value.tensors().items():
            yield f"{name.removesuffix('weight')}{end}", tensor


def dense_modules(rules: Rules, decoder: nn.Module) -> list[str]:
    """The head, and the linear maps of layers that are not quantized, by their names in files."""
    found = _heads(rules)
    for rule in rules.plain:
        modules = _modules(rule, decoder)
        if modules and all(type(module) in (Linear, ExpertLinear) for module in modules):
            names = (name.removesuffix(".weight") for name in rule.names)
            found += [name for name in names if name not in found]
    return found


def _heads(rules: Rules) -> list[str]:
    """Every name of the head: in files, and where transformers gives it another in memory."""
    rule = rules.tied_head
    names = [] if rule is None else [rule.disk]
    names += [rule.names[0] for rule in rules.plain if _memory(rule) == ("lm_head.weight",)]
    return [*dict.fromkeys(["lm_head", *(name.removesuffix(".weight") for name in names)])]


def _modules(rule: Rule | Stack, decoder: nn.Module) -> list[nn.Module]:
    """What holds the weights that it fills: none for a rule of biases."""
    names = (name for name in _memory(rule) if name.endswith(".weight"))
    return [decoder.get_submodule(name.removesuffix(".weight")) for name in names]


def saved_config(
    config: dict[str, Any],
    rules: Rules,
    decoder: nn.Module,
    quantization: Quantization | None,
    compute: torch.dtype,
) -> dict[str, Any]:
    """config.json for the weights as they are now: how they are quantized, if any still is."""
    kinds = (QuantizedLinear, QuantizedExperts)
    if not any(isinstance(module, kinds) for module in decoder.modules()):
        how = published(config, "config.json")
        return config if how is None else {**config, SECTION: None}
    dense = dense_modules(rules, decoder)
    if quantization is not None and config.get(SECTION):
        raise ConfigError(
            f"the model is stored with {SECTION}={config[SECTION]}, which cannot be said beside "
            f"{quantization.format}; load it without quantization to save it"
        )
    if quantization is not None:
        return {**config, SECTION: quantization.section(dense, compute)}
    how = published(config, "config.json")
    if how is not None and how.method == "bitsandbytes":
        known = config[SECTION].get("llm_int8_skip_modules") or _heads(rules)
        if not all(
            any(covers(entry, name) for entry in (*known, *_heads(rules))) for name in dense
        ):
            # An adapter was merged into some of them.
            return {**config, SECTION: {**config[SECTION], "llm_int8_skip_modules": dense}}
    return config


__all__ = ["Arrival", "PackedFiles", "dense_modules", "opened", "to_disk", "wanted"]

"""A checkpoint's files as far as they can be understood: what fails is kept, not raised."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ardor.adapters.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.arch import spec as specs
from ardor.doctor.tensors import Statistics
from ardor.errors import ArdorError, CheckpointError
from ardor.families import family_of
from ardor.families.family import HARMLESS
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Account, Rules
from ardor.files.json import read_object
from ardor.files.weights import INDEX, PICKLED, SINGLE, WeightFiles, open_file, open_weights
from ardor.load import CONFIG, GENERATION, bound_rules, on_meta, tensor_problems
from ardor.packing import PackedFiles, opened
from ardor.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass
class Checkpoint:
    """One directory. None stands for what is not there or was not understood."""

    path: Path
    adapter: bool = False  # of PEFT: no model of its own
    problems: dict[str, str] = field(default_factory=dict)  # part -> why it was not understood
    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    spec: specs.Decoder | None = None
    unread: tuple[str, ...] = ()  # keys of config.json
    files: WeightFiles | None = None
    account: Account | None = None
    packed: frozenset[str] = frozenset()  # tensors that quantized weights are made of
    misfits: tuple[str, ...] = ()  # tensors that do not fill their place
    tokenizer: Tokenizer | None = None
    statistics: tuple[Statistics, ...] = ()  # of the floating-point tensors, as far as read

    @property
    def pickles(self) -> list[str]:
        return [name for name in PICKLED if (self.path / name).exists()]

    @property
    def safetensors(self) -> bool:
        return any((self.path / name).exists() for name in (SINGLE, INDEX))

    def attempt(self, part: str, read: Callable[[], T]) -> T | None:
        """What `read` gives, or None, with the reason noted under `part`."""
        try:
            return read()
        except ArdorError as error:
            self.problems[part] = str(error)
            return None


def open_checkpoint(path: Path, *, use_safetensors: bool = True) -> Checkpoint:
    """Everything but the values of the weights."""
    found = Checkpoint(path, adapter=(path / ADAPTER_CONFIG).exists())
    if found.adapter:
        weights = path / ADAPTER_WEIGHTS
        found.files = found.attempt("weights", lambda: open_file(weights))
        return found
    found.config = found.attempt("config", lambda: read_object(path / CONFIG))
    if found.config is not None:
        _translate(found, found.config)
    if (path / GENERATION).exists():
        found.generation = found.attempt("generation", lambda: read_object(path / GENERATION))
    if (path / "tokenizer.json").exists():
        found.tokenizer = found.attempt("tokenizer", lambda: Tokenizer.from_directory(path))
    if found.safetensors or not (use_safetensors and found.pickles):
        found.files = found.attempt(
            "weights", lambda: open_weights(path, use_safetensors=use_safetensors)
        )
    return found


def _translate(found: Checkpoint, config: dict[str, Any]) -> None:
    hf = HFConfig(config, path=str(found.path / CONFIG))
    found.spec = found.attempt("family", lambda: family_of(config, hf.path).translate(hf))
    if found.spec is not None:
        found.unread = tuple(hf.unread(HARMLESS))


def compare(found: Checkpoint) -> None:
    """Hold the tensors' names, shapes and dtypes against what config.json describes."""
    if found.files is None or found.spec is None or found.config is None:
        return
    held, config, where = found.files, found.config, str(found.path / CONFIG)
    opening = found.attempt("family", lambda: opened(held, config, where))
    if opening is None:
        return
    files, _ = opening
    found.packed = files.parts if isinstance(files, PackedFiles) else frozenset()
    names = files.names()
    rules, fp8 = bound_rules(family_of(found.config), found.spec, found.config, names)
    rules = files.fit(rules) if isinstance(files, PackedFiles) else rules
    found.account = rules.account(names)
    misfits: list[str] = []
    whole = tuple(rule for rule in rules.plain if {*rule.names} <= {*names})
    fitting = []
    for rule in whole:
        try:
            rule.shapes(files.shape)
            files.dtype(rule.names[0])
        except CheckpointError as error:
            misfits.append(str(error))
        else:
            fitting.append(rule)
    rules: Rules = replace(rules, rules=tuple(fitting))
    misfits += tensor_problems(on_meta(found.spec, files, rules, fp8), files, rules)
    found.misfits = tuple(misfits)

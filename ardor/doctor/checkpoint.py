"""A checkpoint's files as far as they can be understood: what fails is kept, not raised."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.arch import spec as specs
from ardor.data.choices import Preferences
from ardor.doctor.data import Reading, Sample
from ardor.doctor.finding import Finding
from ardor.doctor.probe import Probe
from ardor.doctor.runs import RunFolder
from ardor.doctor.tensors import Statistics
from ardor.errors import ArdorError, CheckpointError, TextError
from ardor.families import family_of
from ardor.families.family import HARMLESS
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Account, Rules
from ardor.files.hub import PATTERNS, PICKLE_PATTERNS, resolve
from ardor.files.json import read_object
from ardor.files.runs import chosen_checkpoint
from ardor.files.weights import INDEX, PICKLED, SINGLE, WeightFiles, open_file, open_weights
from ardor.load import CONFIG, GENERATION, bound_rules, on_meta, stops_of, tensor_problems
from ardor.packing import PackedFiles, opened
from ardor.text.chat import ChatTemplate, TrainOn, terminator
from ardor.text.legacy import has_tokenizer
from ardor.text.special import read_config
from ardor.text.stops import StopSet
from ardor.text.templates import default_template
from ardor.text.tokenizer import Tokenizer

T = TypeVar("T")
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Training:
    """What is about to be done with the model: some rules judge it, not the files alone."""

    method: Literal["full", "lora", "qlora"]
    # Whether the control tokens' rows are trained, by whether the template is new to the model.
    trains_control_rows: Callable[[bool], bool]


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
    embedding: str | None = None  # the tensor of the tokens' rows
    head: str | None = None  # the tensor of the output head, where there is one of its own
    tied_copy: tuple[str, str] | None = (
        None  # a stored head that config.json ties: (head, embedding)
    )
    packed: frozenset[str] = frozenset()  # tensors that quantized weights are made of
    misfits: tuple[str, ...] = ()  # tensors that do not fill their place
    tokenizer: Tokenizer | None = None
    statistics: tuple[Statistics, ...] = ()  # of the floating-point tensors, as far as read
    adapter_config: dict[str, Any] = field(default_factory=dict)
    base: "Checkpoint | None" = None  # of an adapter, where it is a directory here
    text_path: Path | None = None  # the directory with the tokenizer's files
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    template: ChatTemplate | None = None
    template_added: bool = False  # it is none of the model's own
    untrained: frozenset[int] = frozenset()  # tokens to be added: a run makes and trains their rows
    # What is looked at beside it.
    data: Sample | None = None
    run: RunFolder | None = None
    probe: Probe | None = None
    training: Training | None = None
    trusted: bool = False  # transformers may run what is not implemented here

    @property
    def rows(self) -> int | None:
        """Of the embedding."""
        if self.base is not None:
            return self.base.rows
        return None if self.spec is None else self.spec.vocab

    @cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json as it is, or as it would be; {} where it was not understood."""
        if self.tokenizer is None or self.text_path is None:
            return {}
        path = self.text_path / TOKENIZER
        as_read = path.exists() and not self.untrained
        return read_object(path) if as_read else self.tokenizer.content

    @cached_property
    def terminator(self) -> int | None:
        """The control token that the template writes after an answer."""
        if self.tokenizer is None or self.template is None:
            return None
        return terminator(self.tokenizer, self.template)

    @cached_property
    def stops(self) -> StopSet:
        """Every token that any of the files calls an end."""
        base = self.base
        config = self.config if base is None else base.config
        generation = self.generation
        if base is not None and self.text_path == base.path:
            generation = base.generation
        return stops_of(self.tokenizer, self.template, generation or {}, config or {})

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


Findings = Iterator[Finding]
Registry = dict[str, Callable[[Checkpoint], Findings]]


def find_checkpoint(
    name: str | Path, revision: str | None = None, *, use_safetensors: bool = True
) -> Checkpoint:
    """The checkpoint that `load` would take by this name: of a run the one that stands for it.

    Raises: CheckpointError if there is no such directory or hub model.
    """
    patterns = PATTERNS if use_safetensors else PICKLE_PATTERNS
    path = resolve(name, revision, patterns=patterns).path
    if not (path / CONFIG).exists():
        path = chosen_checkpoint(path) or path
    found = open_checkpoint(path, use_safetensors=use_safetensors)
    _compare(found)
    return found


def open_checkpoint(path: Path, *, use_safetensors: bool = True) -> Checkpoint:
    """Everything but the values of the weights."""
    found = Checkpoint(path, adapter=(path / ADAPTER_CONFIG).exists())
    if found.adapter:
        _open_adapter(found)
    else:
        found.config = found.attempt("config", lambda: read_object(path / CONFIG))
        if found.config is not None:
            _translate(found, found.config)
    if (path / GENERATION).exists():
        found.generation = found.attempt("generation", lambda: read_object(path / GENERATION))
    _open_text(found)
    if not found.adapter and (found.safetensors or not (use_safetensors and found.pickles)):
        found.files = found.attempt(
            "weights", lambda: open_weights(path, use_safetensors=use_safetensors)
        )
    return found


def template_of_rows(found: Checkpoint) -> ChatTemplate | None:
    """The one that training would render conversations by, where the model has none of its own.

    None where there is nothing to choose: its own cannot be read, or no answer could end.
    """
    if found.template is not None or found.tokenizer is None or "template" in found.problems:
        return found.template
    try:
        return default_template(found.tokenizer)
    except TextError:
        return None


def reading_of(
    found: Checkpoint,
    limit: int | None,
    preferences: Preferences = "chosen",
    train_on: TrainOn = "all",
) -> Reading:
    """How rows are read for this model: examples of at most `limit` tokens, and its positions."""
    assert found.tokenizer is not None
    template, stops = template_of_rows(found), found.stops.ids
    if template is not None and (end := terminator(found.tokenizer, template)) is not None:
        stops |= {end}
    positions = None if found.spec is None else found.spec.max_positions
    known = min((n for n in (limit, positions) if n is not None), default=None)
    return Reading(
        found.tokenizer,
        template,
        stops,
        found.rows,
        known,
        preferences,
        train_on,
    )


def _open_adapter(found: Checkpoint) -> None:
    weights = found.path / ADAPTER_WEIGHTS
    found.files = found.attempt("weights", lambda: open_file(weights))
    said = found.attempt("adapter", lambda: read_object(found.path / ADAPTER_CONFIG))
    found.adapter_config = said or {}
    base = found.adapter_config.get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).is_dir():
        return
    home = Path(base)
    if not (home / CONFIG).exists():
        home = chosen_checkpoint(home) or home
    if not (home / ADAPTER_CONFIG).exists():
        found.base = open_checkpoint(home)


def _open_text(found: Checkpoint) -> None:
    """Files beside an adapter win, as in `load`: fine-tuning may have set a chat template."""
    home = found.path
    if not has_tokenizer(home) and found.base is not None:
        home = found.base.path
    if not has_tokenizer(home):
        return
    found.text_path = home
    found.tokenizer = found.attempt("tokenizer", lambda: Tokenizer.from_directory(home))
    found.tokenizer_config = found.attempt("tokenizer", lambda: read_config(home)) or {}
    found.template = found.attempt("template", lambda: ChatTemplate.from_directory(home))


def _translate(found: Checkpoint, config: dict[str, Any]) -> None:
    hf = HFConfig(config, path=str(found.path / CONFIG))
    found.spec = found.attempt("family", lambda: family_of(config, hf.path).translate(hf))
    if found.spec is not None:
        found.unread = tuple(hf.unread(HARMLESS))


def _name_tables(found: Checkpoint, rules: Rules) -> None:
    assert found.files is not None
    pairs = zip(rules.plain, rules.memory, strict=True)
    held = {name: rule.names[0] for rule, names in pairs for name in names}
    stored = {*found.files.names()} - found.packed
    found.embedding, found.head = (
        name if (name := held.get(f"{table}.weight")) in stored else None
        for table in ("embed_tokens", "lm_head")
    )
    if rules.head_copied and rules.tied_head is not None and found.embedding is not None:
        found.tied_copy = (rules.tied_head.disk, found.embedding)


def _compare(found: Checkpoint) -> None:
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
    _name_tables(found, rules)
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

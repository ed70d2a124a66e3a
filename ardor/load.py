"""The one assembler: name -> files -> config -> family -> spec -> weights -> quantize -> adapt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor.adapters.config import TOKEN_OWNERS, LoraConfig
from ardor.adapters.peft_files import load_adapter
from ardor.adapters.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ardor.adapters.peft_tables import saved_rows
from ardor.arch import spec as specs
from ardor.arch.attention import backend_for
from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.arch.grow import rows_for
from ardor.bridge.assemble import bridge
from ardor.errors import CheckpointError, ConfigError
from ardor.families import family_of, implemented
from ardor.families.family import BRIDGE, Family
from ardor.families.hf_config import HFConfig
from ardor.families.packing import FP8, read_fp8
from ardor.families.rules import Rule, Rules, Stack
from ardor.files.finite import not_finite
from ardor.files.hub import CODE, PATTERNS, PICKLE_PATTERNS, Resolved, resolve
from ardor.files.json import read_object, read_text
from ardor.files.runs import ORIGIN, chosen_checkpoint
from ardor.files.weights import FLOATING, WeightFiles, open_weights, read_tensors
from ardor.form import Form, Growth, Native, state_of
from ardor.packing import (
    Arrival,
    PackedFiles,
    opened,
    require_linears,
    settings,
    wanted,
)
from ardor.parallel.offload import Turns
from ardor.place import PACKED, Filling, Placement, Spread, memory_of, place
from ardor.precision import Precision
from ardor.precision import resolve as resolve_precision
from ardor.quant.config import Quantization
from ardor.quant.fp8 import hold_fp8
from ardor.quant.linear import quantize_decoder
from ardor.quant.mxfp4 import hold_mxfp4
from ardor.text.chat import ChatTemplate
from ardor.text.legacy import has_tokenizer
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer, lacks_rows

CONFIG, GENERATION = "config.json", "generation_config.json"
HOST = torch.device("cpu")


@dataclass
class Model:
    """A decoder with everything its checkpoint says about it. Nothing in it requires gradients."""

    decoder: CausalLM
    form: Form
    config: dict[str, Any]  # config.json as it was read
    generation_config: dict[str, Any]
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stops: StopSet
    precision: Precision
    source: str  # of the base weights: a hub id or an absolute path
    revision: str | None  # the commit, for a hub id
    quantization: str | None = None  # the name of its format
    quantizing: Quantization | None = None  # what was asked, if it was not stored so
    adapter: LoraConfig | None = None
    placement: Placement | None = None  # None: all on one device
    turns: Turns | None = None  # what has a spread decoder compute
    texts: dict[str, str] = field(default_factory=dict)  # JSON files as read, byte for byte
    growths: tuple[Growth, ...] = ()  # tokens added to what `source` holds
    untrained: frozenset[int] = frozenset()  # those of them whose rows nothing has trained yet


@dataclass(frozen=True)
class Origin:
    """Where a name leads: the base model, and the adapter on it if there is one."""

    base: str
    adapter: Path | None
    quantization: Any  # of the base while the adapter was trained
    revision: str | None = None  # of a base on the hub, that the adapter was trained on
    needs_trust: bool = False  # whether that base is run by code that is not ours


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | Spread = "cpu",
    attn_implementation: str | None = None,
    quantization: Any = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    check_finite: bool = False,
) -> Model:
    """Load a checkpoint directory, hub id, adapter directory, or the newest checkpoint of a run.

    Weights are mapped from their files and copied only where dtype or device ask for it, one at a
    time as they are read; with dtype "auto" each stays as it is stored, unless config.json names
    another. `quantization` (see `quant.config.asked`) takes each linear as its tensor arrives. An
    adapter's base is found through its own files and quantized as it was in training, unless said
    otherwise; without `use_safetensors` its weights are read from pickles. `check_finite` refuses
    NaN and infinity, at 0.1 s a GB. Models that we lack are run by transformers, if trusted.

    Raises: CheckpointError, ConfigError or TextError, naming the file and what is wrong with it.
    """
    origin = find_origin(Path(name), str(name), adapter)
    quantization = settings(quantization or origin.quantization)
    _require_trust(origin, trust_remote_code)
    found = _found(origin, revision, use_safetensors=use_safetensors)
    files = _weights(found, use_safetensors=use_safetensors)
    raw = read_object(found.path / CONFIG)
    files, how = opened(files, raw, str(found.path / CONFIG))
    quantizing = wanted(quantization, how, origin.base)
    held = _Held(found, origin.base, raw, files, dtype, device, attn_implementation, quantizing)
    assembled = _assembled(held, check_finite, trusted=trust_remote_code)
    assembled, raw, growths = _grown(assembled, raw, origin)
    decoder, form, precision, placement = assembled
    lora, turns = _adapted(assembled, origin.adapter, check_finite=check_finite)
    text = text_home(origin.adapter, found.path)
    tokenizer, template = read_texts(text, decoder.facts.vocab)
    count_tokens(decoder, tokenizer)
    generation = _optional_json(text / GENERATION)
    return Model(
        decoder=decoder,
        form=form,
        config=raw,
        generation_config=generation,
        tokenizer=tokenizer,
        template=template,
        stops=stops_of(tokenizer, template, generation, raw),
        precision=precision,
        source=str(found.path.resolve()) if found.revision is None else origin.base,
        revision=found.revision,
        quantization=how.name if how else quantizing.format if quantizing else None,
        quantizing=quantizing,
        adapter=lora,
        placement=placement,
        turns=turns,
        texts=_texts(found.path / CONFIG, text / GENERATION),
        growths=growths,
    )


def find_origin(path: Path, name: str, adapter: str | Path | None) -> Origin:
    """Follow a run folder to its newest checkpoint, and an adapter to its base."""
    if not name:  # as a path it would be the current directory
        raise CheckpointError("the model's name is empty; give a directory or a hub id")
    if path.is_dir() and not (path / CONFIG).exists():
        path = chosen_checkpoint(path) or path
    if adapter is None and not (path / ADAPTER_CONFIG).exists():
        return Origin(str(path) if path.is_dir() else name, None, None)
    if adapter is None:
        adapter, name = path, ""
    elif (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{name} is an adapter itself, and one adapter at a time can be put on a model; "
            f"give the base model, and {adapter} as adapter"
        )
    directory = Path(adapter)
    if not (directory / ADAPTER_CONFIG).exists():
        directory = chosen_checkpoint(directory) or directory
    if not (directory / ADAPTER_CONFIG).exists():
        found = "is a whole model" if (directory / CONFIG).exists() else "has none"
        raise CheckpointError(
            f"an adapter's folder holds {ADAPTER_CONFIG}, and {adapter} {found}; give one that "
            "PEFT wrote, or a run of LoRA or QLoRA"
        )
    config = read_object(directory / ADAPTER_CONFIG)
    base = name or config.get("base_model_name_or_path")
    revision = None if name else config.get("revision")
    if not base:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG} does not name its base model; "
            "give the model, and this directory as adapter"
        )
    base_path = Path(base)
    if base_path.is_dir() and not (base_path / CONFIG).exists():
        base = str(chosen_checkpoint(base_path) or base)
    elif base_path.is_absolute() and not base_path.exists():
        raise CheckpointError(
            f"the base model of {directory} was at {base}, which does not exist; "
            "give its new place as the model, and this directory as adapter"
        )
    if base_path.is_dir():
        revision = None
    said = _optional_json(directory / ORIGIN)
    needs_trust = said.get("needs_trust_remote_code", False)
    return Origin(base, directory, said.get("quantization"), revision, needs_trust)


def _require_trust(origin: Origin, given: bool) -> None:
    """Before anything of the base is downloaded."""
    if origin.needs_trust and not given:
        raise ConfigError(
            f"{origin.adapter} is an adapter on {origin.base}, which is not implemented here; "
            f"{BRIDGE}"
        )


@dataclass(frozen=True)
class _Held:
    """A checkpoint that is found, and how it is asked to be held."""

    found: Resolved
    source: str
    config: dict[str, Any]
    files: WeightFiles
    dtype: str | torch.dtype
    place: str | torch.device | Spread
    attn_implementation: str | None
    quantization: Quantization | None

    @property
    def device(self) -> torch.device:
        place = self.place
        return place.device if isinstance(place, Spread) else torch.device(place)

    def settle(self, decoder: CausalLM, precision: Precision) -> None:
        """Move a filled decoder that lies on one device."""
        decoder.to(device=self.device, dtype=precision.conversion)
        decoder.requires_grad_(False).eval()


Assembled = tuple[CausalLM, Form, Precision, Placement | None]


def _assembled(held: _Held, check_finite: bool, *, trusted: bool) -> Assembled:
    """Our decoder; transformers' model where we have none and it is trusted."""
    theirs = trusted and not implemented(held.config)
    return _bridged(held) if theirs else _implemented(held, check_finite)


def _implemented(held: _Held, check_finite: bool) -> Assembled:
    """Our own decoder, with its weights."""
    files = held.files
    backend_for(held.attn_implementation, held.device)  # refused before anything is read
    family, rules, decoder = _described(held.config, held.found.path, files)
    embedding = next(r.names[0] for r in rules.plain if "embed_tokens.weight" in r.memory)
    stored = files.first_floating() or torch.float32
    said = HFConfig(held.config, path=str(held.found.path / CONFIG)).weights_dtype()
    precision = resolve_precision(held.dtype, stored, held.device, said)
    if held.quantization is not None and held.quantization.compute is not None:
        why = "as the quantization asks"
        precision = replace(precision, compute=held.quantization.compute, why=why)
    device = HOST if isinstance(held.place, Spread) else held.device
    arrival = Arrival(decoder, rules, files, held.quantization, device)
    placement = None
    if isinstance(held.place, Spread):
        names = family.rules(decoder.spec)
        placement = _spread(held.place, held, arrival, (rules, names), precision, check_finite)
    else:
        _fill(arrival, rules.plain, precision.conversion, check_finite=check_finite)
        arrival.finish(decoder)
        require_linears(arrival.quantized, held.quantization, held.source)
    _check_whole(decoder, files, rules, embedding)
    if placement is None:
        held.settle(decoder, precision)
    decoder.compute = precision.compute
    asked = held.attn_implementation
    decoder.attend_by(*backend_for(asked, held.device, spec=decoder.spec, compute=decoder.compute))
    kept = {name: files.read(name) for name in rules.kept(files.names())}
    fp8 = read_fp8(HFConfig(held.config, path=CONFIG))
    return decoder, Native(family, decoder.spec, rules, kept, fp8), precision, placement


def _spread(
    spread: Spread,
    held: _Held,
    arrival: Arrival,
    rules: tuple[Rules, Rules],
    precision: Precision,
    check_finite: bool,
) -> Placement:
    """Fill a decoder whose parts lie in several places."""
    decoder, to = arrival.decoder, precision.conversion
    assert isinstance(decoder, Decoder)
    filling = Filling(
        decoder,
        held.files,
        *rules,
        dtype=to,
        fill=lambda some: _fill(arrival, some, to, check_finite=check_finite),
        put=lambda name, tensor: _place(decoder, name, tensor),
        quantize=arrival.finish if arrival.changes else None,
        quantization=arrival.name,
    )
    placement = place(spread, filling)
    decoder.requires_grad_(False).eval()
    return placement


def _bridged(held: _Held) -> Assembled:
    """transformers' model. Code and weights are of one revision: that of the config.json read."""
    if isinstance(held.place, Spread):
        raise ConfigError(
            f"{held.source} is run by transformers, and spread over devices only by it; "
            "give one device as device_map"
        )
    found = held.found
    if found.revision is not None and held.config.get("auto_map"):
        found = resolve(held.source, found.revision, patterns=(*PATTERNS, *CODE))
    if held.attn_implementation is not None:
        backend_for(held.attn_implementation, held.device)
    decoder, form = bridge(
        found,
        held.source,
        held.config,
        dtype=held.dtype,
        attn_implementation=held.attn_implementation,
    )
    why = "as transformers chose" if held.dtype == "auto" else "as asked"
    kept = held.dtype == "auto"
    precision = Precision(decoder.stored, decoder.compute, why, as_stored=kept)
    if (asked := held.quantization) is not None:
        quantized = quantize_decoder(decoder, asked.format, asked.skip)
        require_linears(quantized, asked, held.source)
    held.settle(decoder, precision)
    return decoder, form, precision, None


def _found(origin: Origin, revision: str | None, *, use_safetensors: bool) -> Resolved:
    patterns = PATTERNS if use_safetensors else PICKLE_PATTERNS
    return resolve(origin.base, revision or origin.revision, patterns=patterns)


def _weights(found: Resolved, *, use_safetensors: bool) -> WeightFiles:
    try:
        return open_weights(found.path, use_safetensors=use_safetensors)
    except CheckpointError as error:
        if use_safetensors and found.revision is not None:
            error.add_note(
                "pickles are not downloaded unless asked for: if the repository has no other "
                "weights, give use_safetensors=False (--no-use-safetensors)"
            )
        raise


def _described(
    raw: dict[str, Any], path: Path, files: WeightFiles
) -> tuple[Family, Rules, Decoder]:
    """The decoder that config.json describes, without memory, and the rules to fill it."""
    family = family_of(raw, path=str(path / CONFIG))
    spec = family.spec(HFConfig(raw, path=str(path / CONFIG)))
    rules, fp8 = bound_rules(family, spec, raw, files.names())
    rules.check(files.names(), str(path))
    rules = files.fit(rules) if isinstance(files, PackedFiles) else rules
    decoder = on_meta(spec, files, rules, fp8)
    for problem in tensor_problems(decoder, files, rules):
        raise CheckpointError(problem)
    return family, rules, decoder


def bound_rules(
    family: Family, spec: specs.Decoder, config: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[Rules, FP8 | None]:
    """The rules of a checkpoint that holds tensors of these names, and how it holds FP8 weights."""
    rules, fp8 = family.rules(spec).bind(names), read_fp8(HFConfig(dict(config), path=CONFIG))
    return (rules if fp8 is None else rules.scaled(names, fp8.block)), fp8


def on_meta(
    spec: specs.Decoder, files: WeightFiles, rules: Rules, fp8: FP8 | None = None
) -> Decoder:
    """The decoder of `spec` without memory, with packed weights where the files hold such."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    for name in (name for rule in rules.plain for name in rule.shapes(files.shape)):
        if name.endswith(".blocks"):
            hold_mxfp4(decoder, name.removesuffix(".blocks"))
        if fp8 is not None and name.endswith(".packed"):
            hold_fp8(decoder, name.removesuffix(".packed"), fp8.block)
    return decoder


def tensor_problems(decoder: Decoder, files: WeightFiles, rules: Rules) -> Iterator[str]:
    """What of each stored tensor's shape or dtype is not as it must be to fill its place."""
    wanted = state_of(decoder)
    for rule in rules.plain:
        disk = rule.names[0]
        stored, where = files.dtype(disk), f"{files.file(disk)}: {disk}"
        for name, shape in rule.shapes(files.shape).items():
            place = wanted[name]
            if place.dtype in FLOATING and stored not in FLOATING:
                yield (
                    f"{where} is {stored}, in a quantized format that Ardor does not read; load "
                    "the checkpoint it was made from, and quantize that"
                )
            elif place.dtype not in FLOATING and stored != place.dtype:
                yield f"{where} is stored as {stored}, expected {place.dtype}"
            elif tuple(place.shape) != shape:
                yield (
                    f"{where} gives {name} the shape {list(shape)}, but config.json makes it "
                    f"{list(place.shape)}; the weights do not belong to this config.json: take "
                    "both from the same place"
                )


def _fill(
    arrival: Arrival,
    rules: Sequence[Rule | Stack],
    dtype: torch.dtype | None,
    *,
    check_finite: bool,
) -> None:
    """Put weights in their places, in `dtype` (None: as stored); what is quantized is so first."""
    files = arrival.files

    def read(disk: str) -> Tensor:
        tensor = files.read_as(disk, wanted, device)
        if check_finite:
            _check_finite(tensor, disk, files.file(disk))
        return tensor

    for rule in rules:
        taken = arrival.takes(rule)
        wanted = None if taken or memory_of(rule).endswith(PACKED) else dtype
        device = HOST if taken else arrival.device
        if taken:
            arrival.take(rule, read)
            continue
        for name, tensor in rule.to_memory(read).items():
            _place(arrival.decoder, name, tensor)


def _check_whole(decoder: Decoder, files: WeightFiles, rules: Rules, embedding: str) -> None:
    if rules.head_copied and rules.tied_head is not None:
        copy = files.read(rules.tied_head.disk)
        if not torch.equal(copy, files.read(embedding)):
            raise CheckpointError(
                f"{files.directory}: config.json ties the head to the embedding, but "
                f"{rules.tied_head.disk} differs from it; set tie_word_embeddings to false"
            )
    left = [name for name, held in state_of(decoder).items() if held.is_meta]
    assert not left, f"no rule fills {left}"


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    if problem := not_finite(tensor):
        raise CheckpointError(
            f"{file}: {name} holds {problem}, which training would spread to every weight; "
            "take an earlier checkpoint, or download it again"
        )


def growths_of(adapter: Path | None, rows: int, form: Form) -> tuple[Growth, ...]:
    """The tokens that were added to the base before this adapter was trained on it.

    An adapter of PEFT does not say so, but has tables of more rows than the base, or trains rows
    that it lacks; its tokenizer knows how many there are.
    """
    if adapter is None:
        return ()
    records = _optional_json(adapter / ORIGIN).get("growths", ())
    if records:
        return tuple(Growth.read(record, str(adapter / ORIGIN)) for record in records)
    places = form.disk_linears()
    tables = [places[name].name for name in TOKEN_OWNERS if name in places]
    if (held := saved_rows(adapter / ADAPTER_WEIGHTS, tables)) > rows:
        return (Growth({}, held, rows),)
    indices = read_object(adapter / ADAPTER_CONFIG).get("trainable_token_indices") or ()
    lists = indices.values() if isinstance(indices, dict) else (indices,)
    most = max((id for ids in lists for id in ids), default=-1)
    if most < rows or not (adapter / "tokenizer.json").exists():
        return ()
    needed = max(most + 1, Tokenizer.from_directory(adapter).vocab_rows)
    return (Growth({}, rows_for(needed), rows),)


def _grown(
    assembled: Assembled, config: dict[str, Any], origin: Origin
) -> tuple[Assembled, dict[str, Any], tuple[Growth, ...]]:
    """The base as it was when its adapter was trained: with the rows of added tokens."""
    decoder, form, precision, placement = assembled
    growths = growths_of(origin.adapter, decoder.facts.vocab, form)
    if not growths:
        return assembled, config, ()
    if not isinstance(form, Native) or placement is not None:
        raise ConfigError(
            f"{origin.adapter} adds tokens to {origin.base}, for which its tables must grow; load "
            "it on one device, without trust_remote_code, and merge the adapter first"
        )
    for growth in growths:
        form, config = form.grow(decoder, config, growth)
    return (decoder, form, precision, placement), config, growths


def _adapted(
    assembled: Assembled, adapter: Path | None, *, check_finite: bool
) -> tuple[LoraConfig | None, Turns | None]:
    """Put the adapter, if there is one, on a decoder that lies where it will; begin its turns."""
    decoder, form, _, placement = assembled
    lora = None
    if adapter is not None:
        lora = load_adapter(adapter, decoder, disk_names=form.disk_linears())
        decoder.requires_grad_(False)
        if check_finite:
            weights = adapter / ADAPTER_WEIGHTS
            for name, tensor in read_tensors(weights).items():
                _check_finite(tensor, name, weights)
    decoder.verify()
    if placement is None:
        if lora is not None:
            decoder.to(decoder.device)
        return lora, None
    assert isinstance(decoder, Decoder)
    return lora, placement.start(decoder)


def _place(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    if leaf in dict(module.named_buffers(recurse=False)):
        module.register_buffer(leaf, tensor.contiguous())
    else:
        module.register_parameter(leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))


def text_home(adapter: Path | None, base: Path) -> Path:
    """Files beside the adapter win: fine-tuning may have set a chat template."""
    return adapter if adapter is not None and has_tokenizer(adapter) else base


def read_texts(path: Path, rows: int) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """A checkpoint's tokenizer and chat template, for a model with so many embedding rows."""
    if not has_tokenizer(path):
        return None, None
    tokenizer = Tokenizer.from_directory(path)
    if problem := lacks_rows(tokenizer, rows):
        raise CheckpointError(f"{path / 'tokenizer.json'}: {problem}")
    return tokenizer, ChatTemplate.from_directory(path)


def count_tokens(decoder: CausalLM, tokenizer: Tokenizer | None) -> None:
    """Tell the decoder which of its ids have tokens."""
    rows = decoder.facts.vocab if tokenizer is None else tokenizer.vocab_rows
    decoder.tokens_known = rows if rows < decoder.facts.vocab else None


def stops_of(
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    generation_config: dict[str, Any],
    config: dict[str, Any],
) -> StopSet:
    """Every token that ends a text of this model; empty without a tokenizer."""
    if tokenizer is None:
        return StopSet(frozenset())
    return StopSet.gather(
        tokenizer, template=template, generation_config=generation_config, config=config
    )


def _texts(*files: Path) -> dict[str, str]:
    return {file.name: read_text(file) for file in files if file.exists()}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def default_device() -> torch.device:
    """Where commands put a model unless told: the GPU if this machine has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer.

    Raises: ConfigError if it came without one.
    """
    if model.tokenizer is None:
        raise ConfigError(
            f"{model.source} has no tokenizer.json, which text needs; give token ids, or copy the "
            "tokenizer's files beside the weights"
        )
    return model.tokenizer

"""The one assembler: name -> files -> config -> family -> spec -> weights -> quantize -> adapt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ardor.adapters.lora import LoraConfig
from ardor.adapters.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DiskLinear,
    load_adapter,
)
from ardor.arch import spec as specs
from ardor.arch.attention import backend_for
from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.bridge.assemble import Bridged, bridge
from ardor.bridge.foreign import Foreign
from ardor.errors import CheckpointError, ConfigError
from ardor.families import family_of, implemented
from ardor.families.family import BRIDGE, Family
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Rules
from ardor.files.finite import not_finite
from ardor.files.hub import CODE, PATTERNS, PICKLE_PATTERNS, Resolved, resolve
from ardor.files.json import read_object, read_text
from ardor.files.runs import ORIGIN, newest_checkpoint
from ardor.files.weights import WeightFiles, open_weights, read_tensors, write_weights
from ardor.packing import Arrival, PackedFiles, opened, settings, to_disk, wanted
from ardor.precision import Precision
from ardor.precision import resolve as resolve_precision
from ardor.quant.config import Quantization
from ardor.quant.linear import quantize_decoder
from ardor.quant.mxfp4 import hold_mxfp4
from ardor.text.chat import ChatTemplate
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)  # as values, not codes


@runtime_checkable
class Form(Protocol):
    """How a model lies in the files that other tools read."""

    @property
    def needs_trust(self) -> bool: ...  # whether it is loaded with trust_remote_code only
    @property
    def files(self) -> tuple[str, ...]: ...  # of the checkpoint, beside those that any has
    def disk_linears(self) -> Mapping[str, DiskLinear]: ...
    def write(self, decoder: CausalLM, directory: Path) -> None: ...  # all but the JSON files


@dataclass(frozen=True)
class Native:
    """The form of a model that we implement."""

    family: Family
    spec: specs.Decoder
    rules: Rules  # bound to the names of the checkpoint, so that saving gives them back
    kept: dict[str, Tensor] = field(default_factory=dict)  # of the checkpoint, and not read here

    needs_trust = False
    files = ()

    def disk_linears(self) -> Mapping[str, DiskLinear]:
        """Where transformers, and so PEFT, has each linear map."""
        return self.family.disk_linears(self.spec)

    def write(self, decoder: CausalLM, directory: Path) -> None:
        """Every tensor under the name and in the shape that it was read with."""
        state = state_of(decoder)
        ours = to_disk(self.rules, decoder, lambda name: state[name].detach().cpu())
        write_weights(directory, chain(ours, self.kept.items()))


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
    texts: dict[str, str] = field(default_factory=dict)  # JSON files as read, byte for byte


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
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    quantization: Any = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    check_finite: bool = False,
) -> Model:
    """Load a checkpoint directory, hub id, adapter directory, or the newest checkpoint of a run.

    Weights are mapped from their files and copied only where the dtype or device asks for it; with
    dtype "auto" each keeps the dtype it is stored in. `quantization` (see `quant.config.asked`)
    takes each linear as its tensor arrives. An adapter's base is found through its own files and
    quantized as it was when the adapter was trained, unless said otherwise. Without
    `use_safetensors` the base's weights are read from pickles. `check_finite` refuses a NaN or an
    infinity in them, at 0.1 s a GB. A model that we do not implement is run by transformers, and by
    code in its repository if it names some, with `trust_remote_code` only; a line on stderr says
    what runs before it does.

    Raises: CheckpointError, ConfigError or TextError, naming the file and what is wrong with it.
    """
    origin = _origin(Path(name), str(name), adapter)
    quantization = settings(quantization or origin.quantization)
    _require_trust(origin, trust_remote_code)
    patterns = PATTERNS if use_safetensors else PICKLE_PATTERNS
    found = resolve(origin.base, revision or origin.revision, patterns=patterns)
    files = _weights(found, use_safetensors=use_safetensors)
    raw = read_object(found.path / CONFIG)
    files, how = opened(files, raw, str(found.path / CONFIG))
    quantizing = wanted(quantization, how, origin.base)
    place = torch.device(device)
    held = _Held(found, origin.base, raw, files, dtype, place, attn_implementation, quantizing)
    theirs = trust_remote_code and not implemented(raw)
    decoder, form, precision = _bridged(held) if theirs else _implemented(held, check_finite)
    # "auto" leaves every tensor as it is stored: a file may hold several dtypes.
    decoder.to(device=device, dtype=None if dtype == "auto" else precision.weights)
    decoder.requires_grad_(False).eval()
    lora = _adapted(decoder, origin.adapter, form, check_finite=check_finite)
    decoder.verify()
    text = found.path if origin.adapter is None else _text_home(origin.adapter, found.path)
    tokenizer, template = _text(text, decoder.facts.vocab)
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
        texts=_texts(found.path / CONFIG, text / GENERATION),
    )


def _origin(path: Path, name: str, adapter: str | Path | None) -> Origin:
    """Follow a run folder to its newest checkpoint, and an adapter to its base."""
    if not name:  # as a path it would be the current directory
        raise CheckpointError("the model's name is empty; give a directory or a hub id")
    if path.is_dir() and not (path / CONFIG).exists():
        path = newest_checkpoint(path) or path
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
        directory = newest_checkpoint(directory) or directory
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
        base = str(newest_checkpoint(base_path) or base)
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


def _require_linears(quantized: Sequence[str], held: "_Held") -> None:
    if held.quantization is not None and not quantized:
        raise ConfigError(
            f"quantization={held.quantization.format!r}: {held.source} has no plain linears to "
            "quantize; leave it out"
        )


@dataclass(frozen=True)
class _Held:
    """A checkpoint that is found, and how it is asked to be held."""

    found: Resolved
    source: str
    config: dict[str, Any]
    files: WeightFiles
    dtype: str | torch.dtype
    device: torch.device
    attn_implementation: str | None
    quantization: Quantization | None


def _implemented(held: _Held, check_finite: bool) -> tuple[Decoder, Native, Precision]:
    """Our own decoder, with its weights."""
    files = held.files
    attn = backend_for(held.attn_implementation, held.device)
    family, rules, decoder = _described(held.config, held.found.path, files, attn)
    arrival = Arrival(decoder, rules, files, held.quantization, held.device)
    _fill(decoder, files, rules, arrival, check_finite=check_finite)
    _require_linears(arrival.quantized, held)
    stored = decoder.embed_tokens.weight.dtype
    precision = _computing(resolve_precision(held.dtype, stored, held.device), held.quantization)
    decoder.compute = precision.compute
    kept = {name: files.read(name) for name in rules.kept(files.names())}
    return decoder, Native(family, decoder.spec, rules, kept), precision


def _bridged(held: _Held) -> tuple[Foreign, Bridged, Precision]:
    """transformers' model. Code and weights are of one revision: that of the config.json read."""
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
    if (quantization := held.quantization) is not None:
        _require_linears(quantize_decoder(decoder, quantization.format, quantization.skip), held)
    why = "as stored" if held.dtype == "auto" else "as asked"
    return decoder, form, Precision(decoder.stored, decoder.compute, why)


def _computing(precision: Precision, quantization: Quantization | None) -> Precision:
    """The dtype of computing that a quantization asks for, if it does."""
    if quantization is None or quantization.compute is None:
        return precision
    return Precision(precision.weights, quantization.compute, "as the quantization asks")


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
    raw: dict[str, Any], path: Path, files: WeightFiles, attn: str
) -> tuple[Family, Rules, Decoder]:
    """The decoder that config.json describes, without memory, and the rules to fill it."""
    family = family_of(raw, path=str(path / CONFIG))
    spec = family.spec(HFConfig(raw, path=str(path / CONFIG)))
    rules = family.rules(spec).bind(files.names())
    rules.check(files.names(), str(path))
    rules = files.fit(rules) if isinstance(files, PackedFiles) else rules
    decoder = on_meta(spec, files, rules, attn)
    for problem in tensor_problems(decoder, files, rules):
        raise CheckpointError(problem)
    return family, rules, decoder


def on_meta(spec: specs.Decoder, files: WeightFiles, rules: Rules, attn: str = "sdpa") -> Decoder:
    """The decoder of `spec` without memory, with packed weights where the files hold such."""
    with torch.device("meta"):
        decoder = Decoder(spec, attn=attn)
    for name in (name for rule in rules.plain for name in rule.shapes(files.shape)):
        if name.endswith(".blocks"):
            hold_mxfp4(decoder, name.removesuffix(".blocks"))
    return decoder


def tensor_problems(decoder: Decoder, files: WeightFiles, rules: Rules) -> Iterator[str]:
    """What of each stored tensor's shape or dtype is not as it must be to fill its place."""
    wanted = state_of(decoder)
    for rule in rules.plain:
        disk = rule.names[0]
        stored, where = files.dtype(disk), f"{files.file(disk)}: {disk}"
        for name, shape in rule.shapes(files.shape).items():
            place = wanted[name]
            if place.is_floating_point() and stored not in WEIGHT_DTYPES:
                yield (
                    f"{where} is {stored}, in a quantized format that Ardor does not read; load "
                    "the checkpoint it was made from, and quantize that"
                )
            elif not place.is_floating_point() and stored != place.dtype:
                yield f"{where} is stored as {stored}, expected {place.dtype}"
            elif tuple(place.shape) != shape:
                yield (
                    f"{where} gives {name} the shape {list(shape)}, but config.json makes it "
                    f"{list(place.shape)}; the weights do not belong to this config.json: take "
                    "both from the same place"
                )


def _fill(
    decoder: Decoder, files: WeightFiles, rules: Rules, arrival: Arrival, *, check_finite: bool
) -> None:
    def read(disk: str) -> Tensor:
        tensor = files.read(disk)
        if check_finite:
            _check_finite(tensor, disk, files.file(disk))
        return tensor

    for rule in rules.plain:
        if arrival.take(rule, read):
            continue
        for name, tensor in rule.to_memory(read).items():
            _place(decoder, name, tensor)
    if rules.head_copied and rules.tied_head is not None:
        copy = files.read(rules.tied_head.disk)
        if not torch.equal(copy, decoder.embed_tokens.weight):
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


def _adapted(
    decoder: CausalLM, adapter: Path | None, form: Form, *, check_finite: bool
) -> LoraConfig | None:
    """Put the adapter, if there is one, on a decoder that is where it will stay."""
    if adapter is None:
        return None
    lora = load_adapter(adapter, decoder, disk_names=form.disk_linears())
    decoder.requires_grad_(False).to(decoder.device)
    if check_finite:
        weights = adapter / ADAPTER_WEIGHTS
        for name, tensor in read_tensors(weights).items():
            _check_finite(tensor, name, weights)
    return lora


def _place(decoder: Decoder, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    if leaf in dict(module.named_buffers(recurse=False)):
        module.register_buffer(leaf, tensor.contiguous())
    else:
        module.register_parameter(leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))


def state_of(decoder: nn.Module) -> dict[str, Tensor]:
    """Everything that comes from files, by name: the parameters, and what is stored packed."""
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}


def _text_home(adapter: Path, base: Path) -> Path:
    """Files beside the adapter win: fine-tuning may have set a chat template."""
    return adapter if (adapter / "tokenizer.json").exists() else base


def _text(path: Path, rows: int) -> tuple[Tokenizer | None, ChatTemplate | None]:
    if not (path / "tokenizer.json").exists():
        return None, None
    tokenizer = Tokenizer.from_directory(path)
    if problem := lacks_rows(tokenizer, rows):
        raise CheckpointError(f"{path / 'tokenizer.json'}: {problem}")
    return tokenizer, ChatTemplate.from_directory(path)


def lacks_rows(tokenizer: Tokenizer, rows: int) -> str | None:
    """Why an embedding of so many rows is too small for a tokenizer; None if it is not.

    It must hold what any text can become and what begins or ends one. A further added token may
    lie beyond it, as the image token of Gemma 3's text models does: it is refused where it occurs.
    """
    remedy = (
        "take the tokenizer that belongs to these weights, or let transformers' "
        "resize_token_embeddings make room and save the model again"
    )
    if tokenizer.base_rows > rows:
        return (
            f"its vocabulary has {tokenizer.base_rows} ids, but the embedding only {rows} rows; "
            + remedy
        )
    special = {"BOS": tokenizer.special.bos, "EOS": tokenizer.special.eos}
    special |= {f"the start {id!r}": id for id in tokenizer.prefix}
    for name, id in special.items():
        if id is not None and id >= rows:
            return f"{name} is token {id}, but the embedding has only {rows} rows; {remedy}"
    return None


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

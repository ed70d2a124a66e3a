"""The one assembler: name -> files -> config -> family -> spec -> weights -> quantize -> adapt."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor.adapters.lora import LoraConfig
from ardor.adapters.peft_files import ADAPTER_CONFIG, load_adapter
from ardor.arch.attention import backend_for
from ardor.arch.decoder import Decoder
from ardor.errors import CheckpointError, ConfigError
from ardor.families import family_of
from ardor.families.family import Family
from ardor.families.hf_config import HFConfig
from ardor.families.packing import read_fp8
from ardor.families.rules import Rules
from ardor.files.hub import resolve
from ardor.files.json import read_object, read_text
from ardor.files.runs import ORIGIN, newest_checkpoint
from ardor.files.weights import WeightFiles, open_weights
from ardor.precision import Precision
from ardor.precision import resolve as resolve_precision
from ardor.quant.fp8 import hold_fp8
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


@dataclass
class Model:
    """A decoder with everything its checkpoint says about it. Nothing in it requires gradients."""

    decoder: Decoder
    family: Family
    rules: Rules  # bound to the names of the checkpoint, so that saving gives them back
    config: dict[str, Any]  # config.json as it was read
    generation_config: dict[str, Any]
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stops: StopSet
    precision: Precision
    source: str  # of the base weights: a hub id or an absolute path
    revision: str | None  # the commit, for a hub id
    quantization: str | None = None
    adapter: LoraConfig | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)  # of the checkpoint, and not read here
    texts: dict[str, str] = field(default_factory=dict)  # JSON files as read, byte for byte


@dataclass(frozen=True)
class Origin:
    """Where a name leads: the base model, and the adapter on it if there is one."""

    base: str
    adapter: Path | None
    quantization: str | None  # of the base while the adapter was trained
    revision: str | None = None  # of a base on the hub, that the adapter was trained on


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
) -> Model:
    """Load a checkpoint directory, hub id, adapter directory, or the newest checkpoint of a run.

    Weights are mapped from their files and copied only where the dtype or device asks for it; with
    dtype "auto" each keeps the dtype it is stored in. `quantization` replaces one linear at a time.
    An adapter's base is found through its own files and quantized as it was when the adapter was
    trained, unless said otherwise.

    Raises: CheckpointError, ConfigError or TextError, naming the file and what is wrong with it.
    """
    origin = _origin(Path(name), str(name), adapter)
    quantization = quantization or origin.quantization
    found = resolve(origin.base, revision or origin.revision)
    files = open_weights(found.path)
    attn = backend_for(attn_implementation, torch.device(device))
    raw, family, rules, decoder = _on_meta(found.path, files, attn)
    _fill(decoder, files, rules)
    stored = decoder.embed_tokens.weight.dtype
    precision = resolve_precision(dtype, stored, torch.device(device))
    if quantization is not None and quantization != "none":
        quantize_decoder(decoder, quantization)
    decoder.compute = precision.compute
    # "auto" leaves every tensor as it is stored: a file may hold several dtypes.
    decoder.to(device=device, dtype=None if dtype == "auto" else precision.weights)
    decoder.requires_grad_(False).eval()
    lora = None
    if origin.adapter is not None:
        lora = load_adapter(origin.adapter, decoder, disk_names=family.disk_linears(decoder.spec))
        decoder.requires_grad_(False).to(device)
    text = found.path if origin.adapter is None else _text_home(origin.adapter, found.path)
    tokenizer, template = _text(text)
    generation = _optional_json(text / GENERATION)
    return Model(
        decoder=decoder,
        family=family,
        rules=rules,
        config=raw,
        generation_config=generation,
        tokenizer=tokenizer,
        template=template,
        stops=stops_of(tokenizer, template, generation, raw),
        precision=precision,
        source=str(found.path.resolve()) if found.revision is None else origin.base,
        revision=found.revision,
        quantization=None if quantization == "none" else quantization,
        adapter=lora,
        kept={name: files.read(name) for name in rules.kept(files.names())},
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
    quantization = _optional_json(directory / ORIGIN).get("quantization")
    return Origin(base, directory, quantization, revision)


def _on_meta(
    path: Path, files: WeightFiles, attn: str
) -> tuple[dict[str, Any], Family, Rules, Decoder]:
    """The decoder that config.json describes, without memory, and the rules to fill it."""
    raw = read_object(path / CONFIG)
    family = family_of(raw, path=str(path / CONFIG))
    spec = family.spec(HFConfig(raw, path=str(path / CONFIG)))
    rules = family.rules(spec).bind(files.names())
    fp8 = read_fp8(HFConfig(raw, path=str(path / CONFIG)))
    if fp8 is not None:
        rules = rules.scaled(files.names(), fp8.block)
    rules.check(files.names(), str(path))
    with torch.device("meta"):
        decoder = Decoder(spec, attn=attn)
    for name in (name for rule in rules.plain for name in rule.shapes(files.shape)):
        if name.endswith(".blocks"):
            hold_mxfp4(decoder, name.removesuffix(".blocks"))
        if fp8 is not None and name.endswith(".packed"):
            hold_fp8(decoder, name.removesuffix(".packed"), fp8.block)
    _check_tensors(decoder, files, rules)
    return raw, family, rules, decoder


def _check_tensors(decoder: Decoder, files: WeightFiles, rules: Rules) -> None:
    """Raises: CheckpointError for a tensor whose shape or dtype is not the one there is to fill."""
    wanted = state_of(decoder)
    for rule in rules.plain:
        disk = rule.names[0]
        stored = files.dtype(disk)
        for name, shape in rule.shapes(files.shape).items():
            place = wanted[name]
            if place.dtype in WEIGHT_DTYPES and stored not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{files.file(disk)}: {disk} is {stored}, in a quantized format that "
                    "Ardor does not read; load the checkpoint it was made from, and quantize that"
                )
            if place.dtype not in WEIGHT_DTYPES and stored != place.dtype:
                raise CheckpointError(
                    f"{files.file(disk)}: {disk} is stored as {stored}, expected {place.dtype}"
                )
            if tuple(place.shape) != shape:
                raise CheckpointError(
                    f"{files.file(disk)}: {disk} gives {name} the shape {list(shape)}, "
                    f"but config.json makes it {list(place.shape)}"
                )


def _fill(decoder: Decoder, files: WeightFiles, rules: Rules) -> None:
    for rule in rules.plain:
        for name, tensor in rule.to_memory(files.read).items():
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


def _place(decoder: Decoder, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(owner)
    if leaf in dict(module.named_buffers(recurse=False)):
        module.register_buffer(leaf, tensor.contiguous())
    else:
        module.register_parameter(leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    """Everything that comes from files, by name: the parameters, and what is stored packed."""
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}


def _text_home(adapter: Path, base: Path) -> Path:
    """Files beside the adapter win: fine-tuning may have set a chat template."""
    return adapter if (adapter / "tokenizer.json").exists() else base


def _text(path: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    if not (path / "tokenizer.json").exists():
        return None, None
    return Tokenizer.from_directory(path), ChatTemplate.from_directory(path)


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

"""`ardor plan`: what a model will take, before anything of it but config.json is there.

The arithmetic is in `memory`; here a name becomes a spec, and a use and a machine a plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ardor.arch import spec as specs
from ardor.errors import CheckpointError, ConfigError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Rules
from ardor.files.hub import resolve
from ardor.files.json import read_object
from ardor.files.runs import newest_checkpoint
from ardor.memory.estimate import NF4_FORMATS, WIDTHS, Use
from ardor.memory.fit import Choice, as_asked, cheapest, largest
from ardor.memory.machine import Machine, this_machine
from ardor.memory.shapes import parameters
from ardor.parallel.placement import parse_size
from ardor.train.blueprint import read_blueprint
from ardor.train.config import Train
from ardor.train.presets import PRESETS

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
MOST_ROWS = 4096  # looked for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is planned. Defaults are those of the verbs themselves."""

    purpose: Literal["generate", "finetune", "train"] = "finetune"
    method: Literal["full", "lora", "qlora"] = "lora"
    lora_r: int = 16
    dtype: str = "auto"
    quantization: str | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    max_new_tokens: int = 256
    gpus: str | None = None
    ram: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Known:
    """What the name of a model leads to, without its weights."""

    source: str
    spec: specs.Decoder
    rules: Rules
    stored: str  # dtype of the weights in their files


@dataclass(frozen=True)
class Plan:
    model: Known
    machine: Machine
    asked: Choice
    cheapest: Choice | None
    most_rows: int | None  # that fit, all else as in `cheapest`
    longest: int | None
    device_map: dict[str, Any] | None  # of `cheapest`, where there are GPUs to choose from


def make_plan(name: str, settings: Settings) -> Plan:
    """Read config.json (or a preset, or a spec), and find what fits.

    Raises: CheckpointError or ConfigError, naming the file or the flag.
    """
    machine = described(settings.gpus, settings.ram)
    model = known(name, settings.revision)
    use = use_of(model, settings, machine)
    found = cheapest(model.spec, use, machine)
    rows = longest = None
    if found is not None and found.place in ("cpu", "gpu", "gpus"):
        rows = largest(model.spec, found, machine, "rows", MOST_ROWS)
        longest = largest(model.spec, found, machine, "length", model.spec.max_positions)
    return Plan(model, machine, as_asked(model.spec, use, machine), found, rows, longest, None)


def described(gpus: str | None, ram: str | None) -> Machine:
    """The machine of `--gpus 2x24GiB --ram 128GiB`; what is not said is as on this one.

    `--gpus none` is a machine without.

    Raises: ConfigError for an amount or a number that is none.
    """
    if gpus is None and ram is None:
        return this_machine()
    here = None if gpus is not None and ram is not None else this_machine()
    sizes = _gpus(gpus) if gpus is not None else here.gpus if here else ()
    memory = parse_size(ram, "ram") if ram is not None else here.ram if here else 0
    return Machine(sizes, memory, "the described machine")


def _gpus(text: str) -> tuple[int, ...]:
    found: list[int] = []
    if text.lower() in ("none", "0"):
        return ()
    for part in text.split(","):
        number, times, size = part.strip().rpartition("x")
        if times and not number.strip().isdecimal():
            raise ConfigError(f"gpus: {part!r} is no number of GPUs; give 2x24GiB, or 24GiB")
        found += [parse_size(size, "gpus")] * (int(number) if times else 1)
    return tuple(found)


def known(name: str, revision: str | None = None) -> Known:
    """A preset, a spec's YAML, a config.json, a directory, or a hub id, of which only config.json
    is fetched.

    Raises: CheckpointError or ConfigError if it is none of them, or its family is unknown.
    """
    path = Path(name).expanduser()
    if name in PRESETS or path.suffix in (".yaml", ".yml"):
        blueprint = read_blueprint(Train(data="", model=name))
        return Known(name, blueprint.spec, blueprint.family.rules(blueprint.spec), "float32")
    if path.is_file() and path.suffix == ".json":
        return _configured(read_object(path), path)
    if path.is_dir():
        path = _base(path)
    if path.is_dir():
        return _configured(read_object(path / CONFIG), path / CONFIG)
    found = resolve(
        str(path) if path != Path(name).expanduser() else name, revision, None, (CONFIG,)
    )
    return _configured(read_object(found.path / CONFIG), found.path / CONFIG, name)


def _base(path: Path) -> Path:
    """The directory, or hub id, whose config.json describes the model that `path` leads to."""
    if not (path / CONFIG).exists():
        path = newest_checkpoint(path) or path
    if (path / CONFIG).exists():
        return path
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no {CONFIG}; give the directory of a model, a run or an adapter"
        )
    base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} does not name its base model; give that")
    return _base(Path(base)) if Path(base).is_dir() else Path(base)


def _configured(raw: Mapping[str, Any], path: Path, source: str | None = None) -> Known:
    family = family_of(raw, str(path))
    spec = family.spec(HFConfig(raw, path=str(path)))
    return Known(source or str(path.parent), spec, family.rules(spec), _stored(raw))


def _stored(raw: Mapping[str, Any]) -> str:
    """The dtype that config.json gives the weights; float32 where it says none, as of old."""
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, Mapping) else {}):
        said = part.get("dtype") or part.get("torch_dtype")
        if said:
            return str(said).removeprefix("torch.")
    return "float32"


def use_of(model: Known, settings: Settings, machine: Machine) -> Use:
    """What the settings mean for this model on this machine.

    Raises: ConfigError for settings that contradict each other, or a length beyond the model's.
    """
    spec = model.spec
    if settings.quantization not in (None, *NF4_FORMATS):
        raise ConfigError(
            f"quantization={settings.quantization!r} is not known; choose one of "
            f"{', '.join(NF4_FORMATS)}"
        )
    if settings.dtype not in ("auto", *WIDTHS):
        raise ConfigError(f"dtype={settings.dtype!r} is not one of auto, {', '.join(WIDTHS)}")
    if settings.purpose == "generate":
        return _generating(model, settings, machine)
    length = min(settings.max_length or 1024, spec.max_positions)
    method = "full" if settings.purpose == "train" else settings.method
    if settings.quantization is not None and method != "qlora":
        raise ConfigError(
            f"quantization={settings.quantization} is for method qlora, and method {method} "
            "trains on whole weights; leave it out, or choose qlora"
        )
    compute = _compute(machine) if settings.dtype == "auto" else settings.dtype
    return Use(
        task="train",
        method=method,
        scratch=settings.purpose == "train",
        weights="float32" if method == "full" else compute,
        compute=compute,
        quantization=(settings.quantization or "nf4") if method == "qlora" else None,
        rows=settings.batch_size or 8,
        length=length,
        accumulation=settings.gradient_accumulation_steps,
        rank=settings.lora_r,
        beside=beside(model, "float32" if method == "full" else compute, method),
    )


def _generating(model: Known, settings: Settings, machine: Machine) -> Use:
    spec, weights = model.spec, model.stored if settings.dtype == "auto" else settings.dtype
    length = settings.max_length or min(1024, max(1, spec.max_positions - settings.max_new_tokens))
    if length > spec.max_positions:
        raise ConfigError(
            f"max_length={length} is more than the {spec.max_positions} positions of the model"
        )
    slow = weights == "bfloat16" and settings.dtype == "auto" and _compute(machine) != "bfloat16"
    mapped = weights == model.stored and settings.quantization is None
    return Use(
        task="generate",
        weights=weights,
        compute="float32" if slow else weights,
        quantization=settings.quantization,
        rows=settings.batch_size or 1,
        length=length,
        new_tokens=settings.max_new_tokens,
        mapped=mapped,
        beside=beside(model, weights, settings.quantization),
    )


def _compute(machine: Machine) -> str:
    """What training computes in: bfloat16 where it is fast."""
    if machine.gpus:
        return "bfloat16"
    import torch

    from ardor.precision import fast_bfloat16

    return "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32"


def beside(model: Known, weights: str, how: str | None) -> int:
    """Bytes of the file that stay in memory although the model holds copies of them.

    A mapping lasts until nothing points into it, and the pages that were read count until then:
    all of them where weights are quantized but the tables stay as they are stored; those of what
    lies otherwise in the file (GPT-2's transposed maps, joined q, k and v) where the rest is mapped.
    """
    if weights != model.stored or how == "full":
        return 0
    width = WIDTHS[weights]
    if how in ("qlora", *NF4_FORMATS):
        linears = (s for n, s in parameters(model.spec).items() if n.startswith("layers."))
        return width * sum(map(math.prod, linears))
    return width * rearranged(model)


def rearranged(model: Known) -> int:
    """How many numbers lie otherwise in the file than in memory, and so are copied."""
    import torch

    shapes, total = parameters(model.spec), 0
    with torch.device("meta"):
        for rule in model.rules.plain:
            on_disk = rule.to_disk(lambda name: torch.empty(shapes.get(name, (1,))))
            read = {name: torch.empty(tensor.shape) for name, tensor in on_disk.items()}
            for tensor in rule.to_memory(read.__getitem__).values():
                same = tensor._is_view() or any(tensor is whole for whole in read.values())
                total += 0 if same and tensor.is_contiguous() else tensor.numel()
    return total

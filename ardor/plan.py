"""`ardor plan`: what a model will take, before anything of it but config.json is there.

The arithmetic is in `memory`; here a name becomes a spec, and a use and a machine a plan.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ardor.adapters.config import LoraConfig
from ardor.adapters.kbit import Upcast
from ardor.errors import ArdorError, ConfigError
from ardor.memory.estimate import Held, Use
from ardor.memory.fit import Choice, as_asked, cheapest, expected, longest, most_rows
from ardor.memory.formats import WIDTHS
from ardor.memory.machine import USABLE, Machine, this_machine
from ardor.outline import Outline, beside, originals, outline
from ardor.parallel.placement import Device, device_map, parse_size
from ardor.place import module_names, ties_of, tree
from ardor.quant.formats import format_name
from ardor.train.blueprint import read_blueprint
from ardor.train.config import MasterDtype, Optim, Recompute, Train
from ardor.train.presets import PRESETS

MOST_ROWS = 4096  # looked for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is planned. Defaults are those of the verbs themselves."""

    purpose: Literal["generate", "finetune", "train"] = "finetune"
    method: Literal["full", "lora", "qlora"] = "lora"
    lora_r: int = 16
    init_lora_weights: str = "default"
    use_dora: bool = False
    kbit_upcast: Upcast = "norms"
    optim: Optim = "adamw"
    master_dtype: MasterDtype = "float32"
    gradient_checkpointing: Recompute = "none"
    optimizer_in_backward: bool = False
    offload_optimizer: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    max_new_tokens: int = 256
    gpus: str | None = None
    ram: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Plan:
    model: Outline
    machine: Machine
    asked: Choice
    cheapest: Choice | None
    most_rows: int | None  # that fit, all else as in `cheapest`
    longest: int | None
    device_map: dict[str, Device] | None  # of `cheapest`


def make_plan(name: str, settings: Settings) -> Plan:
    """Read config.json (or a preset, or a spec), and find what fits.

    Raises: CheckpointError or ConfigError, naming the file or the flag.
    """
    machine = described(settings.gpus, settings.ram)
    model = known(name, settings.revision)
    use = use_of(model, settings, machine)
    found = cheapest(model.spec, use, machine)
    rows = length = None
    if found is not None and found.place in ("cpu", "gpu", "gpus"):
        rows = most_rows(model.spec, found, machine, MOST_ROWS)
        length = longest(model.spec, found, machine)
    places = None if found is None else device_map_of(model, found, machine)
    return Plan(model, machine, as_asked(model.spec, use, machine), found, rows, length, places)


def device_map_of(model: Outline, choice: Choice, machine: Machine) -> dict[str, Device]:
    """Where the modules lie, by their names in transformers, as `--device-map auto` puts them.

    Each GPU keeps room for its context, its share of the cache, and what one layer computes.
    """
    if choice.place in ("cpu", "gpu", "disk"):
        return {"": {"cpu": "cpu", "gpu": 0, "disk": "disk"}[choice.place]}
    terms = {term.name: term.bytes for term in choice.estimate.peak.terms}
    shared = terms.get("KV cache", 0) // len(machine.gpus)
    own = terms["device context"] + terms.get("activations", 0) + shared
    memory: dict[Device, int] = {
        index: max(0, int(size * USABLE) - own) for index, size in enumerate(machine.gpus)
    }
    held, theirs = Held(model.spec, choice.use), module_names(model.rules)
    sizes = {name: held.part_bytes(part) for part, name in theirs.items() if part}
    limits = memory | {"cpu": int(machine.ram * USABLE)}
    return device_map(tree(sizes, theirs), "auto", limits, ties_of(model.rules))


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
        if size.strip().isdecimal():  # bytes elsewhere; here it is how many there are
            raise ConfigError(f"gpus: {part!r} names no unit; give 2x24GiB, or 24GiB")
        found += [parse_size(size, "gpus")] * (int(number) if times else 1)
    return tuple(found)


def known(name: str, revision: str | None = None) -> Outline:
    """A preset, a spec's YAML, or whatever `outline` reads.

    Raises: CheckpointError or ConfigError if it is none of them, or its family is unknown.
    """
    if name in PRESETS or Path(name).suffix in (".yaml", ".yml"):
        blueprint = read_blueprint(Train(data="", model=name))
        return Outline(name, blueprint.spec, blueprint.family.rules(blueprint.spec), "float32")
    return outline(name, revision)


def use_of(model: Outline, settings: Settings, machine: Machine) -> Use:
    """What the settings mean for this model on this machine.

    Raises: ConfigError for settings that contradict each other, or a length beyond the model's.
    """
    spec = model.spec
    if settings.quantization not in (None, "none"):
        settings = replace(settings, quantization=format_name(settings.quantization))
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
    if method == "lora" and model.quantization is not None:
        # Adapters on weights that are packed in their file; what is not stays as it is.
        method, settings = "qlora", replace(settings, kbit_upcast="none")
    adapter = _adapter(settings, method)
    packed = settings.quantization or model.quantization or "nf4"
    compute = _compute(machine) if settings.dtype == "auto" else settings.dtype
    weights = settings.master_dtype if method == "full" else compute
    return Use(
        task="train",
        method=method,
        scratch=settings.purpose == "train",
        weights=weights,
        compute=compute,
        quantization=packed if method == "qlora" else None,
        rows=settings.batch_size or 8,
        length=length,
        accumulation=settings.gradient_accumulation_steps,
        rank=settings.lora_r,
        upcast=settings.kbit_upcast,
        begun=adapter.init_lora_weights,
        originals=originals(model, adapter.init_lora_weights),
        offset=adapter.saves_rank > 1,
        dora=adapter.use_dora,
        optim=settings.optim,
        recompute=settings.gradient_checkpointing,
        in_backward=settings.optimizer_in_backward,
        offloaded=settings.offload_optimizer,
        beside=beside(model, weights, method),
    )


def _adapter(settings: Settings, method: str) -> LoraConfig:
    """How adapters begin, and whether they have magnitudes.

    Raises: ConfigError for what `finetune` refuses too.
    """
    begun, dora = settings.init_lora_weights, settings.use_dora
    found = LoraConfig(r=settings.lora_r, init_lora_weights=begun, use_dora=dora)
    if method == "full" and found != LoraConfig(r=settings.lora_r):
        raise ConfigError(
            f"init_lora_weights={begun}, use_dora={dora}: {settings.purpose} with method full has "
            "no adapters; leave them out, or choose lora"
        )
    if (begun == "loftq" and method == "lora") or (found.saves_rank > 1 and method == "qlora"):
        other = "qlora" if begun == "loftq" else "lora"
        raise ConfigError(
            f"init_lora_weights={begun} is for method {other}, and method is {method}; choose "
            f"that, or another beginning (docs/ADAPTERS.md)"
        )
    return found


def expected_generation(name: str, settings: Settings, *, on_cpu: bool) -> Choice | None:
    """What generating will take; None where `outline` does not know the model, which is for `load`.

    Raises: ConfigError if it surely does not fit, with what would.
    """
    try:
        model = outline(name, settings.revision)
    except ArdorError:
        return None
    if model.opaque:
        return None
    machine = this_machine()
    if on_cpu:
        machine = replace(machine, gpus=())
    # A prompt that is longer is refused when it is read, by its tokens.
    length = min(settings.max_length or 1, model.spec.max_positions)
    use = use_of(model, replace(settings, max_length=length), machine)
    return expected(model.spec, use, machine, f"generating with {name}")


def _generating(model: Outline, settings: Settings, machine: Machine) -> Use:
    spec, weights = model.spec, model.stored if settings.dtype == "auto" else settings.dtype
    length = settings.max_length or min(1024, max(1, spec.max_positions - settings.max_new_tokens))
    if length > spec.max_positions:
        raise ConfigError(
            f"max_length={length} is more than the {spec.max_positions} positions of the model"
        )
    quantization = settings.quantization or model.quantization
    quantization = None if quantization == "none" else quantization
    slow = weights == "bfloat16" and settings.dtype == "auto" and _compute(machine) != "bfloat16"
    return Use(
        task="generate",
        weights=weights,
        compute="float32" if slow else weights,
        quantization=quantization,
        rows=settings.batch_size or 1,
        length=length,
        new_tokens=settings.max_new_tokens,
        mapped=weights == model.stored,
        beside=beside(model, weights, quantization),
    )


def _compute(machine: Machine) -> str:
    """What training computes in: bfloat16 where it is fast."""
    if machine.gpus:
        return "bfloat16"
    import torch

    from ardor.precision import fast_bfloat16

    return "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32"

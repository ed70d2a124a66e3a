"""Whether a use fits a machine, and the cheapest change that makes it fit.

Cheapest is what costs least in quality, in this order; each step keeps those before it:

training: as asked; smaller micro-batches with as many more accumulated, which change nothing but
speed; bfloat16 compute; only norms in float32 beside packed weights; LoRA in place of full
training; QLoRA (nf4); nf4 with nested scales; half the length, and again, down to SHORTEST tokens.
generating: as asked; spread over all GPUs; bfloat16; nf4; nf4 with nested scales; parts of the
model kept in host memory, or on disk, and fetched for their turn, which is slow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ardor.arch import spec as specs
from ardor.errors import ConfigError
from ardor.memory.estimate import CONTEXT, PROCESS, Estimate, Held, Use, estimate
from ardor.memory.machine import USABLE, Machine, shown

SURE = 0.9  # an estimate is right to 10 %: what is larger by more cannot fit
HELD = ("weights", "file", "adapters", "gradients", "optimizer", "KV cache")
PLACES = {
    "cpu": "in memory",
    "gpu": "on one GPU",
    "gpus": "over all GPUs",
    "offload": "over GPUs and memory",
    "disk": "with its layers on disk",
}
SHORTEST = 128  # tokens: a shorter example is seldom worth training on


@dataclass(frozen=True)
class Choice:
    """One way to do what is asked, on one machine."""

    use: Use
    place: str  # gpu | gpus | cpu | offload | disk
    needed: int  # bytes, of all the devices of `place`
    there: int  # bytes
    estimate: Estimate
    changes: tuple[str, ...] = ()  # for people: what differs from what was asked

    @property
    def fits(self) -> bool:
        return self.needed <= self.there * USABLE


def as_asked(spec: specs.Decoder, use: Use, machine: Machine) -> Choice:
    """What was asked, on the best single device of the machine."""
    return next(_places(spec, use, machine))


def cheapest(spec: specs.Decoder, use: Use, machine: Machine) -> Choice | None:
    """The first choice that fits, in the order above; None if nothing does."""
    return next((choice for choice in choices(spec, use, machine) if choice.fits), None)


def choices(spec: specs.Decoder, use: Use, machine: Machine) -> Iterator[Choice]:
    """Everything that is tried, in order."""
    steps = _generating(use) if use.task == "generate" else _training(use)
    for changed, changes in steps:
        for choice in _places(spec, changed, machine):
            yield replace(choice, changes=(*changes, *choice.changes))
    if use.task == "generate":
        yield from _offloaded(spec, use, machine)


def expected(spec: specs.Decoder, use: Use, machine: Machine, what: str) -> Choice:
    """`use` as it is asked for; `what` names it in the message.

    A model that is mapped from its file is not refused: it runs as fast as the disk reads it.

    Raises: ConfigError if it surely cannot fit the memory there is, with what would.
    """
    asked = as_asked(spec, use, machine)
    paged = use.task == "generate" and asked.use.mapped and use.quantization is None
    if paged or asked.needed * SURE <= asked.there:
        return asked
    held = sum(term.bytes for term in asked.estimate.peak.terms if term.name in HELD)
    found = cheapest(spec, use, machine)
    remedy = "take a smaller model, or a machine with more memory"
    if found is not None and found.changes:
        flags, size = " ".join(found.changes), shown(found.needed)
        remedy = f"the least change with which it would: {flags} (about {size})"
    raise ConfigError(
        f"{what} takes about {shown(asked.needed)} ({shown(held)} of it weights, gradients and "
        f"optimizer), and there are {shown(asked.there)} ({PLACES[asked.place]}); {remedy}; "
        "`ardor plan` shows more"
    )


def note(choice: Choice) -> str:
    """For people: the peak and its parts."""
    peak = choice.estimate.peak
    terms = ", ".join(f"{term.name} {shown(term.bytes)}" for term in peak.terms)
    more = "" if choice.fits else "; too much to be fast: its file will be read again and again"
    return f"memory: about {shown(peak.bytes)} of {shown(choice.there)} ({terms}){more}"


def most_rows(spec: specs.Decoder, choice: Choice, machine: Machine, limit: int) -> int | None:
    """The most sequences side by side, up to `limit`, with which `choice` still fits its place."""
    return _largest(
        lambda rows: _fits(spec, replace(choice.use, rows=rows), choice.place, machine), limit
    )


def longest(spec: specs.Decoder, choice: Choice, machine: Machine) -> int | None:
    """The same of the length, up to the model's positions."""
    return _largest(
        lambda length: _fits(spec, replace(choice.use, length=length), choice.place, machine),
        spec.max_positions - choice.use.new_tokens,
    )


def _fits(spec: specs.Decoder, use: Use, place: str, machine: Machine) -> bool:
    return any(c.fits for c in _places(spec, use, machine) if c.place == place)


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def _places(spec: specs.Decoder, use: Use, machine: Machine) -> Iterator[Choice]:
    """One device; for generation, all GPUs too. Ardor trains on one device."""
    if not machine.gpus:
        found = estimate(spec, use)
        # The system takes the pages of a file back where it needs them.
        yield Choice(use, "cpu", found.bytes - use.beside, machine.ram, found)
        return
    use = replace(use, accelerator=True, mapped=False, beside=0, compiled=False)
    use = replace(use, originals=0)  # in the host's memory
    found = estimate(spec, use)
    yield Choice(use, "gpu", found.bytes, max(machine.gpus), found)
    if use.task == "generate" and (others := len(machine.gpus) - 1):
        activations = sum(t.bytes for t in found.peak.terms if t.name == "activations")
        needed = found.bytes + others * (CONTEXT + activations)
        changes = ("--device-map auto",)
        yield Choice(use, "gpus", needed, sum(machine.gpus), found, changes)


def _offloaded(spec: specs.Decoder, use: Use, machine: Machine) -> Iterator[Choice]:
    """Parts of the model elsewhere; what computes holds two layers at a time, and the tables."""
    narrow = use if use.quantization else replace(use, weights="bfloat16", compute="bfloat16")
    changes = ("--dtype bfloat16",) if narrow.weights != use.weights else ()
    if machine.gpus:
        choice = next(_places(spec, narrow, machine))
        there = sum(machine.gpus) + machine.ram
        needed = choice.needed + PROCESS["generate"]
        moved = (*changes, "--device-map auto")
        yield replace(choice, place="offload", needed=needed, there=there, changes=moved)
    choice = next(_places(spec, narrow, machine))
    held = Held(spec, choice.use)
    sizes = [held.part_bytes(f"layers.{i}") for i in range(len(spec.layers))]
    layers, kept = sum(sizes), 2 * max(sizes)
    moved = (*changes, "--device-map disk")
    yield replace(choice, place="disk", needed=choice.needed - layers + kept, changes=moved)


def _generating(use: Use) -> Iterator[tuple[Use, tuple[str, ...]]]:
    yield use, ()
    changes: tuple[str, ...] = ()
    if use.weights != "bfloat16" or use.compute != "bfloat16":
        use = replace(use, weights="bfloat16", compute="bfloat16", mapped=False, beside=0)
        changes = ("--dtype bfloat16",)
        yield use, changes
    for format in ("nf4", "nf4-dq"):
        if use.quantization not in (format, "nf4-dq"):
            use = replace(use, quantization=format, mapped=False, beside=0)
            yield use, (*changes, f"--quantization {format}")


def _training(use: Use) -> Iterator[tuple[Use, tuple[str, ...]]]:
    yield use, ()
    asked, together = use, use.rows * use.accumulation

    def smaller(use: Use, changes: tuple[str, ...]) -> Iterator[tuple[Use, tuple[str, ...]]]:
        rows = use.rows
        while rows > 1:
            rows = max(1, rows // 2)
            steps = -(-together // rows)
            flags = f"--per-device-train-batch-size {rows} --gradient-accumulation-steps {steps}"
            yield replace(use, rows=rows, accumulation=steps), (*changes, flags)

    yield from smaller(use, ())
    changes: tuple[str, ...] = ()
    for lesser, changes in _lesser(asked):
        use = lesser
        yield use, changes
        yield from smaller(use, changes)
    while use.length > SHORTEST:
        use = replace(use, length=max(SHORTEST, use.length // 2), rows=1, accumulation=together)
        flags = f"--per-device-train-batch-size 1 --gradient-accumulation-steps {together}"
        yield use, (*changes, flags, f"--max-length {use.length}")


def _lesser(use: Use) -> Iterator[tuple[Use, tuple[str, ...]]]:
    """Other ways to train, the better ones first."""
    changes: tuple[str, ...] = ()
    if use.compute != "bfloat16":
        held = use.weights if use.method == "full" else "bfloat16"
        use, changes = replace(use, compute="bfloat16", weights=held), ("--dtype bfloat16",)
        yield use, changes
    if use.scratch:
        return
    if use.method == "qlora" and use.upcast == "peft":
        use, changes = replace(use, upcast="norms"), (*changes, "--kbit-upcast norms")
        yield use, changes
    if use.method == "full":
        use = replace(use, method="lora", weights=use.compute)
        yield use, (*changes, "--method lora")
    for format in ("nf4", "nf4-dq"):
        if use.quantization not in (format, "nf4-dq"):
            if use.offset:  # a part of the full weights, which are not there then
                use = replace(use, begun="default", offset=False)
                changes = (*changes, "--init-lora-weights default")
            use = replace(use, method="qlora", quantization=format)
            flag = "" if format == "nf4" else " --quantization nf4-dq"
            yield use, (*changes, f"--method qlora{flag}")

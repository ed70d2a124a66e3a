"""Whether a use fits a machine, and the cheapest change that makes it fit.

Cheapest is what costs least in quality, in this order; each step keeps those before it:

training: as asked; smaller micro-batches with as many more accumulated, which change nothing but
speed; bfloat16 compute; LoRA in place of full training; QLoRA (nf4); nf4 with nested scales; half
the length, and again, down to SHORTEST tokens.
generating: as asked; spread over all GPUs; bfloat16; nf4; nf4 with nested scales; parts of the
model kept in host memory, or on disk, and fetched for their turn, which is slow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ardor.arch import spec as specs
from ardor.memory.estimate import CONTEXT, PROCESS, Estimate, Held, Use, estimate
from ardor.memory.machine import USABLE, Machine

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


def largest(
    spec: specs.Decoder, choice: Choice, machine: Machine, field: str, most: int
) -> int | None:
    """The largest `rows` or `length`, up to `most`, with which `choice` still fits its place."""

    def fits(value: int) -> bool:
        use = replace(choice.use, **{field: value})
        found = (c for c in _places(spec, use, machine) if c.place == choice.place)
        return any(c.fits for c in found)

    return _bisected(fits, most)


def _bisected(fits: Callable[[int], bool], most: int) -> int | None:
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
        yield Choice(use, "cpu", found.bytes, machine.ram, found)
        return
    use = replace(use, accelerator=True, mapped=False, beside=0, compiled=False)
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
    layers = sum(held.layer_bytes(i) for i in range(len(spec.layers)))
    kept = 2 * max(held.layer_bytes(i) for i in range(len(spec.layers)))
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
    together = use.rows * use.accumulation

    def smaller(use: Use, changes: tuple[str, ...]) -> Iterator[tuple[Use, tuple[str, ...]]]:
        rows = use.rows
        while rows > 1:
            rows = max(1, rows // 2)
            steps = -(-together // rows)
            flags = f"--per-device-train-batch-size {rows} --gradient-accumulation-steps {steps}"
            yield replace(use, rows=rows, accumulation=steps), (*changes, flags)

    yield from smaller(use, ())
    for use, changes in _lesser(use):
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
    if use.method == "full":
        use = replace(use, method="lora", weights=use.compute)
        yield use, (*changes, "--method lora")
    for format in ("nf4", "nf4-dq"):
        if use.quantization not in (format, "nf4-dq"):
            use = replace(use, method="qlora", quantization=format)
            flag = "" if format == "nf4" else " --quantization nf4-dq"
            yield use, (*changes, f"--method qlora{flag}")

"""Rules about the values of the weights."""

import torch

from ardor.doctor.checkpoint import Checkpoint, Findings, Registry
from ardor.doctor.finding import Finding, listed, many
from ardor.doctor.tensors import Statistics

OUTLIER = 100.0  # times the root mean square of the tensor's others


def not_finite(it: Checkpoint) -> Findings:
    """No weight is NaN or infinite. (The codes of a packed weight, seen as numbers, may be.)"""
    numbers = (s for s in it.statistics if s.name not in it.packed or "absmax" in s.name)
    broken = [s for s in numbers if s.nan or s.infinite]
    if broken:
        nan, infinite = sum(s.nan for s in broken), sum(s.infinite for s in broken)
        counts = [f"{s.name} ({s.nan:,} NaN, {s.infinite:,} infinite)" for s in broken]
        yield Finding(
            "E",
            f"{nan:,} NaN and {infinite:,} infinite values in {many(len(broken), 'tensor')}",
            f"{listed(counts)} in {listed(sorted({s.file for s in broken}), 2)}",
            "take an earlier checkpoint, or download it again; training refuses it",
        )


def dead_tensor(it: Checkpoint) -> Findings:
    """No matrix is zero throughout. (Vectors may be: biases, and norms stored as w - 1.)"""
    dead = [s.name for s in _matrices(it) if s.zero]
    if dead:
        what = f"{many(len(dead), 'matrix', 'matrices')} of zeros throughout"
        fix = "check that it was trained, and saved whole"
        if it.adapter:
            what, fix = what + ": the adapter changes nothing there", "train it, or leave it out"
        yield Finding("W", what, listed(dead), fix)


def constant_rows(it: Checkpoint) -> Findings:
    """No row of a matrix holds one value throughout."""
    found = [s for s in _matrices(it) if s.constant_rows and not s.zero]
    inner = [s for s in found if it.spec is None or s.shape[0] != it.spec.vocab]
    if inner:
        facts = [f"{s.name} ({s.constant_rows:,} of {s.rows:,} rows)" for s in inner]
        what = f"{many(len(inner), 'matrix', 'matrices')} with rows of one value throughout"
        yield Finding("W", what, listed(facts, 3), "check that it was trained, and saved whole")
    for held in found:
        if held in inner:
            continue
        first = f"{held.name}, rows {listed(held.constant)}"
        what = f"{held.constant_rows:,} of {held.rows:,} rows of the vocabulary hold one value each"
        if it.tokenizer is not None and held.constant[0] >= it.tokenizer.vocab_rows:
            yield Finding("I", what, first, "none needed: the tokenizer has no such ids")
        else:
            fix = "these tokens were never trained: train their rows where texts use them"
            yield Finding("W", what, first, fix)


def outlier(it: Checkpoint) -> Findings:
    """No weight is far from all others of its tensor."""
    far = [s for s in _matrices(it) if s.largest > OUTLIER * s.rms]
    if far:
        far.sort(key=lambda s: s.rms / s.largest)
        facts = [f"{s.name} (largest {s.largest:.4g}, rms {s.rms:.4g})" for s in far]
        count = many(len(far), "matrix", "matrices")
        what = f"{count} with a value above {OUTLIER:g} times the rms of the others"
        fix = "none needed; 4-bit formats lose most in such blocks: compare scores if you quantize"
        yield Finding("I", what, listed(facts, 3), fix)


def float16_range(it: Checkpoint) -> Findings:
    """Every weight is a finite number in float16 too."""
    most = torch.finfo(torch.float16).max
    large = [s for s in it.statistics if s.dtype != torch.float16 and s.largest > most]
    if large:
        facts = [f"{s.name} (largest {s.largest:.4g})" for s in large]
        what = f"{many(len(large), 'tensor')} with values that are infinite in float16"
        yield Finding("W", what, listed(facts, 3), "load it in bfloat16 or float32")


def config_dtype(it: Checkpoint) -> Findings:
    """The dtype that config.json names is the one that most of the weights have."""
    config = it.config or {}
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    sizes, stored = _sizes(it), stored_dtype(it) or said
    if said and said != stored:
        yield Finding(
            "W",
            f"config.json says {said}, and the weights are {stored}",
            ", ".join(f"{count:,} values in {name}" for name, count in sizes.items()),
            "none for Ardor, which goes by the weights; others convert them on loading",
        )


def _matrices(it: Checkpoint) -> list[Statistics]:
    """Of weights: a scale of a quantized one says nothing by being like its neighbour."""
    return [s for s in it.statistics if len(s.shape) > 1 and s.name not in it.packed]


def _sizes(it: Checkpoint) -> dict[str, int]:
    """How many values are stored in each dtype."""
    sizes: dict[str, int] = {}
    for held in it.statistics:
        name = str(held.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + held.rows * (held.shape or (1,))[-1]
    return sizes


def stored_dtype(it: Checkpoint) -> str | None:
    """The dtype of most values; None if none was read."""
    sizes = _sizes(it)
    return max(sizes, key=lambda name: sizes[name], default=None)


RULES: Registry = {
    "not-finite": not_finite,
    "dead-tensor": dead_tensor,
    "constant-rows": constant_rows,
    "outlier": outlier,
    "float16-range": float16_range,
    "config-dtype": config_dtype,
}

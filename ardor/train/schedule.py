"""The learning rate of every optimizer step, as a share of its peak."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial"]


class Shape(NamedTuple):
    """Where a schedule's curve has its corners."""

    steps: int
    warmup: int
    decay: int  # steps of the fall at the end, of wsd
    min_share: float
    power: float  # of polynomial


def _constant(step: int, shape: Shape) -> float:
    return 1.0


def _linear(step: int, shape: Shape) -> float:
    return shape.min_share + (1 - shape.min_share) * (1 - _progress(step, shape))


def _cosine(step: int, shape: Shape) -> float:
    """Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5."""
    fallen = (1 + math.cos(math.pi * _progress(step, shape))) / 2
    return shape.min_share + (1 - shape.min_share) * fallen


def _polynomial(step: int, shape: Shape) -> float:
    fallen = (1 - _progress(step, shape)) ** shape.power
    return shape.min_share + (1 - shape.min_share) * fallen


def _wsd(step: int, shape: Shape) -> float:
    """Constant, then a fall like 1 - sqrt: Hägele et al. 2024, arXiv:2405.18392, section 3."""
    left = shape.steps - step
    if left >= shape.decay:
        return 1.0
    fallen = 1 - math.sqrt(1 - left / shape.decay)
    return shape.min_share + (1 - shape.min_share) * fallen


def _inverse_sqrt(step: int, shape: Shape) -> float:
    """Vaswani et al. 2017, arXiv:1706.03762, section 5.3; needs no number of steps."""
    scale = max(1, shape.warmup)
    return max(shape.min_share, math.sqrt(scale / (step - shape.warmup + scale)))


SCHEDULES: Mapping[Schedule, Callable[[int, Shape], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "polynomial": _polynomial,
}


def _progress(step: int, shape: Shape) -> float:
    return (step - shape.warmup) / max(1, shape.steps - shape.warmup)


def rate_share(
    step: int,
    *,
    steps: int,
    warmup: int,
    kind: Schedule,
    min_share: float = 0.0,
    decay: int = 1,
    power: float = 1.0,
) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`: a linear rise, then what `kind` says.

    The first step is above 0 and the rise ends at 1; the last step of a decay stands just before
    `min_share`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[kind](step, Shape(steps, warmup, max(1, decay), min_share, power))

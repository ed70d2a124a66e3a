"""The learning rate of every optimizer step, as a share of its peak."""

import math
from typing import Literal

from ardor.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant"]


def rate_share(
    step: int, *, steps: int, warmup: int, kind: Schedule, min_share: float = 0.0
) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`: a linear rise, then the decay.

    The first step is above 0 and the rise ends at 1; the last step of a decay stands just before
    `min_share`. Source of the cosine: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return min_share + (1 - min_share) * (1 - progress)
        case "cosine":
            return min_share + (1 - min_share) * (1 + math.cos(math.pi * progress)) / 2
        case _:
            raise ConfigError(f"lr_scheduler_type={kind!r} is not cosine, linear or constant")

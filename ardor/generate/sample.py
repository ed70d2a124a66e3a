"""How the next token is chosen: each choice is a closure from logits to ids.

Axes: B batch rows, V vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ardor.errors import ConfigError

Choose = Callable[[Float[Tensor, "B V"]], Int[Tensor, "B"]]


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
    """The most probable token; the lowest id among equals."""
    return logits.argmax(-1)


def sampler(
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Choose:
    """Draw from softmax(logits / temperature), cut to the tokens that every filter keeps.

    temperature 0 is `greedy`. top_k keeps the k most probable; top_p the fewest whose probability
    reaches p; min_p those with at least min_p times the top probability. The most probable token
    always stays.

    Raises: ConfigError for a value outside its range.
    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1; min-p: arXiv:2407.01082.
    """
    _check(temperature, top_k, top_p, min_p)
    if temperature == 0:
        return greedy

    def choose(logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
        probs, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
        keep = torch.ones_like(probs, dtype=torch.bool)
        if top_k is not None:
            keep[:, top_k:] = False
        if top_p is not None:
            keep &= probs.cumsum(-1) - probs < top_p  # what stood before it did not reach p
        if min_p is not None:
            keep &= probs >= min_p * probs[:, :1]
        keep[:, 0] = True
        drawn = torch.multinomial(probs * keep, 1, generator=generator)
        return ids.gather(-1, drawn).squeeze(-1)

    return choose


def _check(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} must be finite and at least 0 (0: greedy)")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"min_p={min_p} must be from 0 to 1")


def penalise_repetition(
    logits: Float[Tensor, "V"], seen: Int[Tensor, "N"], penalty: float
) -> Float[Tensor, "V"]:
    """Logits of tokens in `seen` divided by `penalty` where positive, multiplied where negative.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1.
    """
    ids = seen.unique()
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty))

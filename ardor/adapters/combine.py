"""Adapters added up into another, map by map: which of their numbers count, and how much.

A rule adds stacked tensors. It acts on the factors, A with A and B with B, or ("..._svd") on the
changes s B A, whose sum is cut to a rank; `cat` and `svd` are the plain weighted sum.

Axes: M adapters, R adapter rank.
Source: Yadav et al. 2023, arXiv:2306.01708, section 3 (TIES); Yu et al. 2023, arXiv:2311.03099,
section 3 (DARE); names and order of steps are those of PEFT 0.21, LoraModel.add_weighted_adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.adapters.embedding import (
    AdaptedHead,
    LoraEmbedding,
    SavedModule,
    TrainableHead,
    TrainableTokens,
)
from ardor.adapters.initial import Start
from ardor.adapters.lora import LoraExperts, LoraLinear
from ardor.errors import ConfigError

_PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
HOWS = ("cat", "linear", "svd", *_PRUNING, *(f"{how}_svd" for how in _PRUNING))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How adapters are added up; names are PEFT's, but for `how`, `rank` (svd_rank) and `seed`.

    Raises: ConfigError for a way that is not known, and a setting that is missing, out of its
        range or of no use to that way.
    """

    how: str = "cat"
    rank: int | None = None  # of "svd" and "..._svd"; None: the highest of theirs
    density: float | None = None  # the share of each tensor that is kept
    majority_sign_method: str = "total"  # of the sum; "frequency": of the count
    seed: int = 0  # of what DARE drops

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise ConfigError(f"how={self.how!r} is not known; choose one of {', '.join(HOWS)}")
        if self.rank is not None and (self.rank < 1 or not self.cuts):
            raise ConfigError(
                f"rank={self.rank} is for svd and ways that end in _svd, 1 or more; how="
                f"{self.how!r} " + ("cuts to it" if self.cuts else "has the rank that follows")
            )
        prunes = self.rule in _PRUNING
        if prunes and self.density is None:
            raise ConfigError(
                f"how={self.how!r} keeps a share of each adapter: give a density "
                "(--adapter-density)"
            )
        if self.density is not None and not prunes:
            raise ConfigError(
                f"density={self.density:g} is for ties, dare and magnitude_prune; how={self.how!r} "
                "keeps everything"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density:g} is no share above 0 and up to 1")
        if self.majority_sign_method not in SIGNS:
            raise ConfigError(
                f"majority_sign_method={self.majority_sign_method!r} is not known; choose one of "
                f"{', '.join(SIGNS)}"
            )
        if self.majority_sign_method != "total" and "ties" not in self.rule:
            raise ConfigError(f"majority_sign_method is for ties; how={self.how!r} elects no signs")

    @property
    def cuts(self) -> bool:
        """Whether whole changes are added up, and their sum is cut to a rank."""
        return self.how == "svd" or self.how.endswith("_svd")

    @property
    def rule(self) -> str:
        return "linear" if self.how in ("cat", "svd") else self.how.removesuffix("_svd")


CAT = Combination()  # exact


class _Part(NamedTuple):
    """One adapter of a map as a plain product."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float


def trim(stack: Float[Tensor, "M *front out in"], density: float) -> Float[Tensor, "M ..."]:
    """Each matrix with its largest numbers, a share of `density` rounded down, and 0 elsewhere."""
    flat = stack.flatten(-2)
    kept = flat.abs().topk(int(density * flat.shape[-1]), dim=-1).indices
    return torch.zeros_like(flat).scatter(-1, kept, flat.gather(-1, kept)).view_as(stack)


def drop(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number with a chance of `density`, over it, so that the expectation stays; else 0."""
    chance = torch.rand(stack.shape, generator=generator).to(stack.device)
    return stack * (chance < density) / density


def weighted(stack: Float[Tensor, "M ..."], weights: Float[Tensor, "M"]) -> Tensor:
    """The sum over adapters."""
    return torch.tensordot(weights, stack, dims=1)


def agreed(stack: Float[Tensor, "M ..."], weights: Float[Tensor, "M"], method: str) -> Tensor:
    """The weighted mean of the numbers whose sign is the majority's, before weights; 0: positive.

    The mean is over their count, as in TIES and PEFT, not over their weights.
    """
    votes = stack if method == "total" else stack.sign()
    sign = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = stack.sign() == sign
    return weighted(stack * agree, weights) / agree.sum(0).clamp(min=1)


_Rule = Callable[[Combination, torch.Generator, Tensor, Tensor], Tensor]


def _share(c: Combination) -> float:
    return 1.0 if c.density is None else c.density


_RULES: dict[str, _Rule] = {
    "linear": lambda c, g, stack, w: weighted(stack, w),
    "magnitude_prune": lambda c, g, stack, w: weighted(trim(stack, _share(c)), w),
    "dare_linear": lambda c, g, stack, w: weighted(drop(stack, _share(c), g), w),
    "ties": lambda c, g, stack, w: agreed(trim(stack, _share(c)), w, c.majority_sign_method),
    "dare_ties": lambda c, g, stack, w: agreed(
        drop(stack, _share(c), g), w, c.majority_sign_method
    ),
}


def combined(
    place: str,
    members: Sequence[tuple[nn.Module, float]],
    combination: Combination,
    generator: torch.Generator,
) -> nn.Module | None:
    """The sum of what stands at one place, with weights; None for a head that follows another.

    Raises: ConfigError for modules that are more than a product of A and B, and for ranks that
        differ where factors are added up.
    """
    first = members[0][0]
    parts: list[_Part] = []
    for module, weight in members:
        if isinstance(module, LoraEmbedding):
            a, b = module.lora_embedding_A, module.lora_embedding_B
        elif isinstance(module, AdaptedHead):
            return None  # follows its embedding, which is combined too
        elif more := _more(module):
            raise ConfigError(
                f"{place} is adapted by more than a product of A and B ({more}), which cannot be "
                "added; merge one adapter into the base, and train the other on that"
            )
        else:
            assert isinstance(module, LoraExperts | LoraLinear)
            a, b = module.whole
        parts.append(_Part(a, b, module.scale, weight))
    with torch.no_grad():
        a, b = _sum(place, parts, combination, generator)
    r = a.shape[-2]
    if isinstance(first, LoraEmbedding):
        made = LoraEmbedding(first.base, r, r)
        made.lora_embedding_A.data, made.lora_embedding_B.data = a, b
        return made.requires_grad_(False)
    assert isinstance(first, LoraLinear | LoraExperts)
    if isinstance(first, LoraExperts):
        starts = [Start(one, two) for one, two in zip(a, b, strict=True)]
        return LoraExperts(first.base, r, r, start=starts).requires_grad_(False)
    return LoraLinear(first.base, r, r, start=Start(a, b)).requires_grad_(False)


def _more(module: nn.Module) -> str | None:
    """What adapts a map beside a product of A and B, or instead of it."""
    if isinstance(module, TrainableTokens | TrainableHead):
        return "rows of single tokens"
    if isinstance(module, SavedModule):
        return "all of its weights"
    if isinstance(module, LoraLinear) and module.lora_magnitude_vector is not None:
        return "DoRA"
    return "lora_bias" if getattr(module, "lora_B_bias", None) is not None else None


def _sum(
    place: str, parts: list[_Part], combination: Combination, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    ranks = [part.a.shape[-2] for part in parts]
    if combination.how == "cat":
        a = torch.cat([part.weight * part.scale * part.a for part in parts], -2)
        return a, torch.cat([part.b for part in parts], -1)
    device = parts[0].a.device
    rule = _RULES[combination.rule]
    if not combination.cuts:
        if len({*ranks}) > 1:
            raise ConfigError(
                f"how={combination.how!r} adds A to A, but their ranks at {place} are {ranks}; use "
                "'cat', 'svd' or a way that ends in _svd"
            )
        weights = torch.tensor([part.weight * part.scale for part in parts], device=device)
        root = weights.abs().sqrt()
        # The sign goes to one side: on both it would cancel.
        a = rule(combination, generator, torch.stack([p.a for p in parts]), root * weights.sign())
        return a, rule(combination, generator, torch.stack([p.b for p in parts]), root)
    weights = torch.tensor([part.weight for part in parts], device=device)
    changes = torch.stack([p.scale * (p.b @ p.a) for p in parts])
    total = rule(combination, generator, changes, weights)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    r = min(combination.rank or max(ranks), s.shape[-1])
    return vh[..., :r, :].contiguous(), (u[..., :, :r] * s[..., None, :r]).contiguous()

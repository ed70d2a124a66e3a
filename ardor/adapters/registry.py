"""Several adapters of one model: loaded beside each other, one at work, or combined into another.

Axes: R adapter rank.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ardor.adapters.config import LoraConfig
from ardor.adapters.embedding import AdaptedHead, LoraEmbedding
from ardor.adapters.initial import Start
from ardor.adapters.lora import LoraExperts, LoraLinear
from ardor.adapters.merge import Attached, Merged, attach, detach, merge, unmerge
from ardor.adapters.peft_files import load_adapter
from ardor.adapters.peft_layout import DiskLinear
from ardor.errors import ConfigError

How = Literal["cat", "linear", "svd"]


class Adapters:
    """The adapters of one decoder by name. At most one is at work; the others take memory only."""

    def __init__(
        self,
        decoder: nn.Module,
        disk_names: Mapping[str, DiskLinear],
        first: LoraConfig | None = None,
    ):
        self._decoder, self._disk_names = decoder, disk_names
        self._configs: dict[str, LoraConfig] = {}
        self._parts: dict[str, Attached] = {}
        self._merged: Merged | None = None
        self._held = 0  # requests under way that must keep theirs
        self.active: str | None = None
        if first is not None:
            self._configs["default"] = first
            self.active = "default"

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def __getitem__(self, name: str) -> LoraConfig:
        self._check(name)
        return self._configs[name]

    def load(self, directory: str | Path, name: str) -> None:
        """Read the adapter of a PEFT directory; which one is at work does not change.

        Raises: ConfigError if the name is taken; what `load_adapter` raises.
        """
        if name in self._configs:
            raise ConfigError(
                f"there is an adapter {name!r} already; give another name, or remove it first"
            )
        self._require_apart()
        with self.using(None):
            was = [p for p in self._decoder.parameters() if p.requires_grad]
            config = load_adapter(directory, self._decoder, disk_names=self._disk_names)
            for parameter in self._decoder.parameters():
                parameter.requires_grad_(False)
            for parameter in was:
                parameter.requires_grad_(True)
            self._parts[name] = detach(self._decoder)
        self._configs[name] = config

    def rename(self, name: str, to: str) -> None:
        """Raises: ConfigError if there is no such adapter, or one of the new name."""
        self._check(name)
        if to in self._configs:
            raise ConfigError(f"there is an adapter {to!r} already; give another name")
        self._configs = {to if n == name else n: c for n, c in self._configs.items()}
        if name in self._parts:
            self._parts[to] = self._parts.pop(name)
        self.active = to if self.active == name else self.active

    def remove(self, name: str) -> None:
        """Forget an adapter, taking it off the model if it is at work."""
        self._check(name)
        if self.active == name:
            self.use(None)
        del self._configs[name]
        self._parts.pop(name, None)

    def use(self, name: str | None) -> None:
        """Put one adapter to work in place of another; None: the base as it is."""
        if name is not None:
            self._check(name)
        self._require_apart()
        if name == self.active:
            return
        if self._held:
            raise ConfigError(
                f"a stream with adapter {self.active!r} has not been read to the end; finish or "
                "close it before another adapter is used"
            )
        if self.active is not None:
            self._parts[self.active] = detach(self._decoder)
        self.active = None
        if name is not None:
            training = self._decoder.training
            attach(self._decoder, self._parts.pop(name))
            self._decoder.train(training)
            self.active = name

    @contextmanager
    def using(self, name: str | None, *, hold: bool = False) -> Iterator[None]:
        """`use` for as long as the block lasts; with `hold` nothing may change it meanwhile."""
        before = self.active
        self.use(name)
        self._held += hold
        try:
            yield
        finally:
            self._held -= hold
            self.use(before)

    def merge(self) -> Merged:
        """Fold the adapter at work into the weights, which are kept: `unmerge` is exact."""
        self._require_apart()
        if self.active is None:
            raise ConfigError("no adapter is at work that could be merged; use one first")
        self._merged = merge(self._decoder)
        return self._merged

    def unmerge(self) -> None:
        """Take the merged adapter out of the weights, bit for bit; it is at work as before."""
        if self._merged is None:
            raise ConfigError("nothing is merged")
        unmerge(self._decoder, self._merged)
        self._merged = None

    def combine(
        self, name: str, weights: Mapping[str, float], *, how: How = "cat", rank: int | None = None
    ) -> None:
        """Make another adapter whose change is the weighted sum of the changes of others.

        "cat" is exact, with the sum of their ranks; "svd" is the best of `rank` (None: the highest
        of theirs); "linear" adds A to A and B to B, of equal ranks, which is only near where they
        are alike. What they began at and takes off counts to their ranks.

        Raises: ConfigError for names that are not there or taken, ranks that differ, and adapters
            that are more than products of A and B (DoRA, token rows, modules in full).
        Source: PEFT 0.21, LoraModel.add_weighted_adapter.
        """
        if name in self._configs:
            raise ConfigError(f"there is an adapter {name!r} already; give another name")
        if not weights:
            raise ConfigError("there is nothing to combine; give {adapter: weight}")
        for known in weights:
            self._check(known)
        with self.using(None):
            sources = {known: self._parts[known] for known in weights}
            places = dict.fromkeys(place for parts in sources.values() for place in parts)
            combined: Attached = {}
            for place in places:
                members = [
                    (sources[k][place], w) for k, w in weights.items() if place in sources[k]
                ]
                made = _combined(place, members, how, rank)
                if made is not None:
                    combined[place] = made
            embedding = combined.get("embed_tokens")
            if isinstance(embedding, LoraEmbedding) and self._head_is_tied():
                combined["lm_head"] = AdaptedHead(embedding)
            self._parts[name] = combined
        first = self._configs[next(iter(weights))]
        ranks = [m.r for m in combined.values() if isinstance(m, LoraLinear | LoraExperts)]
        r = max(ranks, default=first.r)
        self._configs[name] = replace(
            first,
            r=r,
            lora_alpha=r,
            use_rslora=False,
            init_lora_weights="default",
            lora_dropout=0.0,
            rank_pattern={},
            alpha_pattern={},
        )

    def _head_is_tied(self) -> bool:
        return getattr(self._decoder, "lm_head", ...) is None

    def _check(self, name: str) -> None:
        if name not in self._configs:
            near = difflib.get_close_matches(name, self._configs, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"there are {[*self._configs]}"
            raise ConfigError(f"there is no adapter {name!r}; {known}")

    def _require_apart(self) -> None:
        if self._merged is not None:
            raise ConfigError(f"{self.active!r} is merged into the weights; unmerge it first")


def _combined(
    place: str, members: list[tuple[nn.Module, float]], how: How, rank: int | None
) -> nn.Module | None:
    first = members[0][0]
    parts: list[tuple[Tensor, Tensor, float]] = []
    for module, weight in members:
        if isinstance(module, LoraEmbedding):
            parts.append(
                (module.lora_embedding_B.T, module.lora_embedding_A.T, weight * module.scale)
            )
        elif isinstance(module, LoraExperts) or (
            isinstance(module, LoraLinear) and module.lora_magnitude_vector is None
        ):
            parts.append((*module.whole, weight * module.scale))
        elif isinstance(module, AdaptedHead):
            return None  # follows its embedding, which is combined below
        else:
            kind = type(module).__name__ + (" with DoRA" if isinstance(module, LoraLinear) else "")
            raise ConfigError(
                f"{place} is adapted by more than a product of A and B ({kind}), which cannot be "
                "added; merge one adapter into the base, and train the other on that"
            )
    with torch.no_grad():
        a, b = _sum(place, parts, how, rank)
    r = a.shape[-2]
    if isinstance(first, LoraEmbedding):
        made = LoraEmbedding(first.base, r, r)
        made.lora_embedding_A.data, made.lora_embedding_B.data = b.T.contiguous(), a.T.contiguous()
        return made.requires_grad_(False)
    assert isinstance(first, LoraLinear | LoraExperts)
    if isinstance(first, LoraExperts):
        starts = [Start(one, two) for one, two in zip(a, b, strict=True)]
        return LoraExperts(first.base, r, r, start=starts).requires_grad_(False)
    return LoraLinear(first.base, r, r, start=Start(a, b)).requires_grad_(False)


def _sum(
    place: str, parts: list[tuple[Tensor, Tensor, float]], how: How, rank: int | None
) -> tuple[Tensor, Tensor]:
    ranks = [a.shape[-2] for a, _, _ in parts]
    if how == "cat":
        a = torch.cat([scale * a for a, _, scale in parts], -2)
        return a, torch.cat([b for _, b, _ in parts], -1)
    if how == "linear":
        if len({*ranks}) > 1:
            raise ConfigError(
                f"how='linear' adds A to A, but their ranks at {place} are {ranks}; use 'cat' or "
                "'svd'"
            )
        # The sign goes to one side: on both it would cancel.
        a = sum(a * (abs(s) ** 0.5 * (1 if s >= 0 else -1)) for a, _, s in parts)
        b = sum(b * abs(s) ** 0.5 for _, b, s in parts)
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return a, b
    if how != "svd":
        raise ConfigError(f"how={how!r} is not known; choose cat, linear or svd")
    total = sum(scale * (b @ a) for a, b, scale in parts)
    assert isinstance(total, Tensor)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    r = min(rank or max(ranks), s.shape[-1])
    return vh[..., :r, :].contiguous(), (u[..., :, :r] * s[..., None, :r]).contiguous()

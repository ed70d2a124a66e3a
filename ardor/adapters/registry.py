"""Several adapters of one model: loaded beside each other, one at work, or added up."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ardor.adapters.combine import CAT, Combination, combined
from ardor.adapters.config import LoraConfig
from ardor.adapters.embedding import AdaptedHead, LoraEmbedding
from ardor.adapters.lora import LoraExperts, LoraLinear
from ardor.adapters.merge import Attached, Merged, attach, detach, merge, unmerge
from ardor.adapters.peft_files import load_adapter
from ardor.adapters.peft_layout import DiskLinear
from ardor.errors import ConfigError


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
        self,
        name: str,
        weights: Mapping[str, float],
        combination: Combination = CAT,
    ) -> None:
        """Make another adapter of the weighted sum of others, in the way `combination.how`.

        "cat" is exact, with the sum of their ranks; "svd" is the best of `rank` (None: the highest
        of theirs); "linear" adds A to A and B to B, of equal ranks, which is only near where they
        are alike. "magnitude_prune" keeps the largest numbers of each tensor, a share of `density`;
        "ties" of those the ones whose sign is the majority's, in mean; "dare_linear" and
        "dare_ties" keep numbers by chance (`seed`), enlarged. Those four act on A and B as "linear"
        does, or with "_svd" behind on whole changes. What adapters began at and takes off counts to
        their ranks.

        Raises: ConfigError for names that are not there or taken, ranks that differ, and adapters
            that are more than products of A and B (DoRA, token rows, modules in full).
        Source: see `ardor.adapters.combine`.
        """
        if name in self._configs:
            raise ConfigError(f"there is an adapter {name!r} already; give another name")
        if not weights:
            raise ConfigError("there is nothing to combine; give {adapter: weight}")
        for known in weights:
            self._check(known)
        with self.using(None):
            made = self._combined(weights, combination)
            self._parts[name] = made
        first = self._configs[next(iter(weights))]
        ranks = [m.r for m in made.values() if isinstance(m, LoraLinear | LoraExperts)]
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

    def _combined(self, weights: Mapping[str, float], combination: Combination) -> Attached:
        sources = {known: self._parts[known] for known in weights}
        generator = torch.Generator().manual_seed(combination.seed)
        made: Attached = {}
        for place in dict.fromkeys(place for parts in sources.values() for place in parts):
            members = [(sources[k][place], w) for k, w in weights.items() if place in sources[k]]
            module = combined(place, members, combination, generator)
            if module is not None:
                made[place] = module
        embedding = made.get("embed_tokens")
        if isinstance(embedding, LoraEmbedding) and self._head_is_tied():
            made["lm_head"] = AdaptedHead(embedding)
        return made

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

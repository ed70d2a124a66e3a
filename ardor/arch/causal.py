"""What generation, scoring and training ask of a language model, whoever wrote its layers.

Axes: B batch rows, T new positions, D what a position's state holds, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ardor.arch.experts import Routing
from ardor.arch.layout import Layout
from ardor.errors import ShapeError


@runtime_checkable
class Facts(Protocol):
    """What is known of a model before any of its weights are."""

    @property
    def vocab(self) -> int: ...  # token ids are below it
    @property
    def max_positions(self) -> int: ...
    @property
    def balance(self) -> float: ...  # weight of the routers' load-balancing loss


@runtime_checkable
class Cache(Protocol):
    """What a model keeps of the positions it has read; `past` counts them, row by row."""

    past: list[int]

    def stale(self, new: int) -> list[int]: ...
    def advance(self, new: int) -> None: ...
    def row(self, index: int) -> "Cache": ...
    def keep(self, rows: list[int]) -> None: ...


@dataclass(frozen=True)
class Devices:
    """Where a model computes that is spread over several."""

    ends: torch.device  # of ids and of logits
    layers: tuple[torch.device, ...]


class CausalLM(nn.Module):
    """Token ids -> states -> logits, in two calls, so that the loss can be chunked.

    `compute` is the dtype of activations. Its parts have Decoder's names, or `place_of` says what
    they are (see arch.linear).
    """

    compute: torch.dtype
    # Ids from here on belong to no token (rows that fill up a table): they are never written, and
    # take no probability in losses, scores and samples. None: every id has a token.
    tokens_known: int | None = None
    devices: Devices | None = None  # None: where its weights are; said by whoever spreads it

    @property
    def facts(self) -> Facts:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device if self.devices is None else self.devices.ends

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raises: ShapeError for a token id that has no row in the embedding."""
        for id in ids:
            if not 0 <= id < self.facts.vocab:
                raise ShapeError(
                    f"token id {id} is not one of the model's {self.facts.vocab} ids, 0 to "
                    f"{self.facts.vocab - 1}; take that token out of the text"
                )

    def verify(self) -> None:
        """Raise ConfigError if the model, as it is held now, is no causal language model.

        Nothing to do for one that is right by construction.
        """

    def new_cache(self, *, rows: int, capacity: int) -> Cache:
        """An empty cache of `rows` rows that hold up to `capacity` positions each."""
        raise NotImplementedError

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        layout: Layout | None = None,
        cache: Any = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The state of every position, from which `logits` predicts the next.

        Without a cache `layout` says where documents end (None: each row is one). With a cache of
        this model the tokens continue its rows; the caller advances it by T afterwards.
        """
        raise NotImplementedError

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits in the dtype of `hidden`."""
        raise NotImplementedError

    def head_parts(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """(function, parameters): `head(x)` is function(x, *parameters), for the chunked loss."""
        raise NotImplementedError

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Unnormalised log-probabilities of the next token, float32."""
        return self.head(hidden).float()

    def token_logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """The same, -inf for ids that belong to no token."""
        logits = self.logits(hidden)
        if self.tokens_known is not None:
            logits[..., self.tokens_known :] = -torch.inf
        return logits

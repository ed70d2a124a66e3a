"""Adapters of the embedding and of the head tied to it, rows of single tokens, and whole copies.

Axes: R adapter rank, D model width, V vocabulary, n trainable tokens.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from ardor.adapters.config import scale_of
from ardor.adapters.initial import drawing_device
from ardor.errors import ConfigError


class TrainableTokens(nn.Module):
    """An embedding, or a head, of which the rows of a few tokens are replaced by trained ones.

    Rows, not differences, are kept in float32 and rounded to the dtype of the base: a base that
    was resized and filled with other random rows then gives the same model.

    Source: PEFT 0.21, TrainableTokensLayer.
    """

    trainable_tokens_delta: nn.Parameter  # (n, D); PEFT's name for the new rows
    token_ids: Tensor  # (n,)
    slots: Tensor  # (V,): the row of each token here, or -1

    def __init__(self, base: nn.Module, ids: tuple[int, ...]):
        super().__init__()
        self.base = base.requires_grad_(False)
        weight = base.get_parameter("weight")
        wrong = [i for i in ids if not 0 <= i < len(weight)]
        if wrong or len(set(ids)) < len(ids):
            raise ConfigError(
                f"trainable_token_indices {wrong or list(ids)} must be different ids below the "
                f"{len(weight)} rows of the embedding"
            )
        index = torch.tensor(ids, device=weight.device)
        slots = torch.full((len(weight),), -1, dtype=torch.int32, device=weight.device)
        slots[index] = torch.arange(len(ids), dtype=torch.int32, device=weight.device)
        self.register_buffer("token_ids", index, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[index].float())

    @property
    def rows(self) -> Float[Tensor, "n D"]:
        """The trained rows as the model uses them, in the dtype of the base."""
        return self.trainable_tokens_delta.to(self.base_weight.dtype)

    @property
    def base_weight(self) -> Float[Tensor, "V D"]:
        """The weight without its trained rows."""
        # Not get_parameter: the chunked loss puts a plain tensor in its place.
        return cast(Tensor, self.base.weight)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The weight with its trained rows: a copy, differentiable in those rows only."""
        return self.base_weight.index_copy(0, self.token_ids, self.rows)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        slot = self.slots[ids]
        trained = F.embedding(slot.clamp(min=0), self.rows)
        return torch.where((slot >= 0)[..., None], trained, self.base(ids))


class TrainableHead(nn.Module):
    """Logits from the weight of a TrainableTokens, without a copy of that weight.

    A tied decoder gets one as its `lm_head` while rows of its embedding are trained: the head then
    uses the same rows, and no gradient of the whole embedding is ever formed.
    """

    def __init__(self, tokens: TrainableTokens):
        super().__init__()
        self.tokens = tokens

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        return self.tokens.weight

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        frozen = self.tokens.base_weight.to(hidden.dtype)
        logits = F.linear(hidden, frozen)
        trained = F.linear(hidden, self.tokens.rows.to(hidden.dtype))
        return logits.index_copy_(-1, self.tokens.token_ids, trained)


class LoraEmbedding(nn.Module):
    """The rows of W + scale * (B A)^T that are looked up; A of a token is a column.

    A begins at zero and B normal, so that a fresh adapter changes nothing. The head of a tied
    decoder is `AdaptedHead` of this module.

    Source: Hu et al. 2021, arXiv:2106.09685, loralib's Embedding; names and shapes are PEFT's.
    """

    lora_embedding_A: nn.Parameter  # (R, V)
    lora_embedding_B: nn.Parameter  # (D, R)

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: int | float,
        *,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        weight = base.get_parameter("weight")
        self.r, self.alpha, self.rslora = r, alpha, rslora
        rows, width = weight.shape
        b = torch.empty(width, r, device=drawing_device(generator)).normal_(generator=generator)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, rows, device=weight.device))
        self.lora_embedding_B = nn.Parameter(b.to(weight.device))

    @property
    def scale(self) -> float:
        return scale_of(self.r, self.alpha, rslora=self.rslora)

    @property
    def base_weight(self) -> Float[Tensor, "V D"]:
        """The weight without its adapter."""
        return cast(Tensor, self.base.weight)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The weight with its adapter, rounded once: a copy."""
        return (self.base_weight.float() + self.delta()).to(self.base_weight.dtype)

    def delta(self) -> Float32[Tensor, "V D"]:
        """scale * (B A)^T, what the adapter adds to the weight."""
        return self.scale * (self.lora_embedding_A.T @ self.lora_embedding_B.T)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        found = self.base(ids)
        low = F.embedding(ids, self.lora_embedding_A.T)
        return found + (self.scale * F.linear(low, self.lora_embedding_B)).to(found.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, rslora={self.rslora}"


class AdaptedHead(nn.Module):
    """Logits from the weight of a LoraEmbedding: what ties a head to an adapted embedding."""

    def __init__(self, embedding: LoraEmbedding):
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        return self.embedding.weight

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        own, dtype = self.embedding, hidden.dtype
        logits = F.linear(hidden, own.base_weight.to(dtype)).reshape(-1, len(own.base_weight))
        low = F.linear(hidden, own.lora_embedding_B.T.to(dtype)).reshape(-1, own.r)
        a = own.lora_embedding_A.to(dtype)
        # Not -1: the loss asks a head about no rows, to see its dtype.
        return torch.addmm(logits, low, a, alpha=own.scale).view(*hidden.shape[:-1], a.shape[1])


class SavedModule(nn.Module):
    """A module that is trained in full beside an adapter: a float32 copy in front of the original.

    PEFT calls it modules_to_save, and keeps the copy in the base's dtype, where the small steps of
    a bfloat16 weight are lost. A tied head reads the `weight` of its embedding, so both change.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.copy = copy.deepcopy(base).float().requires_grad_(True)
        for size in ("inputs", "outputs"):
            if hasattr(base, size):
                setattr(self, size, getattr(base, size))

    @property
    def base_weight(self) -> Tensor:
        return self.base.get_parameter("weight")

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.copy.weight)  # a plain tensor in the chunked loss

    @property
    def bias(self) -> nn.Parameter | None:
        found: Any = getattr(self.copy, "bias", None)
        return found

    def forward(self, x: Tensor) -> Any:
        made = self.copy(x)
        if not isinstance(made, Tensor):
            return made  # a router's decision
        return made.to(x.dtype if x.is_floating_point() else self.base_weight.dtype)

"""Low-rank adapters on linear maps, and trainable rows of the embedding and the head.

Axes: R adapter rank, D model width, V vocabulary, n trainable tokens.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from ardor.arch.linear import place_of
from ardor.errors import ConfigError

ALL_LINEAR = "all-linear"
TOKEN_OWNERS = ("embed_tokens", "lm_head")  # modules whose rows can be trained one by one


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly; the names are PEFT's.

    `target_modules` is "all-linear" (every linear of the layers, never the head) or endings of
    module names, ours or the checkpoint's: "q_proj", "mixer.q_proj", "c_attn". Rows of
    `trainable_token_indices` are trained in full: ids for the embedding (and the head tied to it),
    or {"embed_tokens": ids, "lm_head": ids}.
    """

    r: int = 16
    lora_alpha: int | float = 32
    lora_dropout: int | float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False  # scale by alpha / sqrt(r); Kalajdzievski 2023, arXiv:2312.03732
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora_r={self.r} is no rank; set 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} is outside [0, 1)")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise ConfigError(
                f"target_modules={self.target_modules!r} is neither {ALL_LINEAR!r} nor a list of "
                f"names; write ({self.target_modules!r},) for a single one"
            )

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """The trainable ids of each module that has some."""
        asked = self.trainable_token_indices
        rows = asked if isinstance(asked, Mapping) else {"embed_tokens": tuple(asked)}
        if unknown := set(rows) - set(TOKEN_OWNERS):
            raise ConfigError(
                f"trainable_token_indices names {sorted(unknown)}; rows can be trained in "
                f"{' and '.join(TOKEN_OWNERS)}"
            )
        return {name: tuple(ids) for name, ids in rows.items() if ids}


class LoraLinear(nn.Module):
    """y = base(x) + scale * B(A(dropout(x))), with A and B in float32, computed in x.dtype.

    A is uniform in +-1/sqrt(in) and B zero, so that a fresh adapter changes nothing. `base` is any
    linear module with `inputs`, `outputs` and a forward, and is frozen.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; the initialisation is PEFT's.
    """

    lora_A: nn.Parameter  # (R, in)
    lora_B: nn.Parameter  # (out, R)

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: int | float,
        dropout: int | float = 0.0,
        *,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.inputs, self.outputs = size_of(base)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        # Drawn where the generator lives, so that a seed means the same on every device.
        place = "cpu" if generator is None else generator.device
        bound = 1 / math.sqrt(self.inputs)  # Kaiming-uniform with a = sqrt(5)
        a = torch.empty(r, self.inputs, dtype=torch.float32, device=place)
        a.uniform_(-bound, bound, generator=generator)
        device = _device(base)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.outputs, r, dtype=torch.float32, device=device))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        y = self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        low = low.reshape(-1, self.r)
        # One pass over y, and one rounding, for the product, the scale and the sum.
        flat = torch.addmm(
            y.reshape(-1, self.outputs), low, self.lora_B.to(x.dtype).T, alpha=self.scale
        )
        return flat.view(y.shape)

    def delta(self) -> Float32[Tensor, "out in"]:
        """scale * B A, what the adapter adds to the weight."""
        return self.scale * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}, rslora={self.rslora}"


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


def add_lora(
    decoder: nn.Module,
    config: LoraConfig,
    *,
    names: Callable[[str], str] = str,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Freeze `decoder` and wrap the linears that `config` targets; their names, in order.

    `names` gives the name that the checkpoint has for a linear of ours; targets may use either.
    Weights are drawn in the order of the names, so one generator state gives one adapter.

    Raises: ConfigError for a target that matches nothing (with the nearest names), for token ids
        that are no rows, and for a decoder that already has adapters.
    """
    if any(True for _ in lora_modules(decoder)):
        raise ConfigError("this model already has an adapter; merge it before adding another")
    targets = select(decoder, config.target_modules, names)
    rows = config.token_rows  # checked before anything is changed
    if "lm_head" in rows and "lm_head" in targets:
        raise ConfigError("lm_head is in target_modules and in trainable_token_indices; drop one")
    decoder.requires_grad_(False)
    add_token_rows(decoder, rows)
    for name in targets:
        wrapped = LoraLinear(
            decoder.get_submodule(name),
            config.r,
            config.lora_alpha,
            config.lora_dropout,
            rslora=config.use_rslora,
            generator=generator,
        )
        replace(decoder, name, wrapped)
    return targets


def add_token_rows(decoder: nn.Module, rows: Mapping[str, tuple[int, ...]]) -> None:
    """Make the rows of these ids trainable in `embed_tokens` and `lm_head`.

    The head of a tied decoder follows its embedding and takes no rows of its own.

    Raises: ConfigError for ids that are no rows, rows of a head that the decoder has not, or a
        decoder whose embedding is not ours.
    """
    if rows and not hasattr(decoder, "embed_tokens"):
        raise ConfigError(
            "the rows of single tokens cannot be trained in a model that transformers runs; set "
            "train_control_tokens to no (--train-control-tokens no)"
        )
    tied = getattr(decoder, "lm_head", None) is None
    if tied and "lm_head" in rows:
        raise ConfigError(
            "trainable_token_indices names lm_head, but this model's head is its embedding; "
            "name embed_tokens only, and both follow"
        )
    wrapped = {name: TrainableTokens(decoder.get_submodule(name), rows[name]) for name in rows}
    if "embed_tokens" in wrapped:
        replace(decoder, "embed_tokens", wrapped["embed_tokens"])
        if tied:
            replace(decoder, "lm_head", TrainableHead(wrapped["embed_tokens"]))
    if "lm_head" in wrapped:
        replace(decoder, "lm_head", TrainableHead(wrapped["lm_head"]))


def select(
    decoder: nn.Module, targets: str | tuple[str, ...], names: Callable[[str], str]
) -> tuple[str, ...]:
    """The linears of `decoder` that `targets` means, by our names, in the decoder's order."""
    linears = linear_names(decoder)
    if isinstance(targets, str):
        found = tuple(name for name in linears if place_of(decoder, name) == "layers")
        if not found:
            raise ConfigError("this model has no linear maps in its layers that could be adapted")
        return found
    both = {name: (name, names(name)) for name in linears}
    for target in targets:
        if not any(ends_with(full, target) for pair in both.values() for full in pair):
            known = sorted({end for pair in both.values() for end in _endings(pair)})
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.5) or known[:8]
            raise ConfigError(
                f"target module {target!r} matches no linear of this model; "
                f"did you mean {', '.join(near)}? {ALL_LINEAR!r} takes every linear of the layers"
            )
    return tuple(
        name
        for name, pair in both.items()
        if any(ends_with(full, target) for full in pair for target in targets)
    )


def ends_with(name: str, ending: str) -> bool:
    """Whether the last dotted parts of `name` are `ending`: PEFT's rule for lists of targets."""
    return name == ending or name.endswith(f".{ending}")


def linear_names(decoder: nn.Module) -> list[str]:
    """The linears of the layers and the head, adapted or not; not what is inside an adapter."""
    found: list[str] = []
    for name, module in decoder.named_modules():
        inside = bool(found) and name.startswith(f"{found[-1]}.")
        if (
            place_of(decoder, name)
            and not inside
            and hasattr(module, "inputs")
            and hasattr(module, "outputs")
        ):
            found.append(name)
    return found


def lora_modules(decoder: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted linears with their names."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def lora_parameters(decoder: nn.Module) -> list[nn.Parameter]:
    """What an adapter trains: A and B of every adapted linear, and the trainable token rows."""
    found = []
    for module in decoder.modules():
        if isinstance(module, LoraLinear):
            found += [module.lora_A, module.lora_B]
        if isinstance(module, TrainableTokens):
            found.append(module.trainable_tokens_delta)
    return found


def replace(decoder: nn.Module, name: str, module: nn.Module | None) -> None:
    """Put `module` where the dotted `name` is. Unlike torch's own, also in a place that is None."""
    owner, _, leaf = name.rpartition(".")
    if module is None:
        delattr(decoder.get_submodule(owner), leaf)  # else a None stays among the modules
    setattr(decoder.get_submodule(owner), leaf, module)


def size_of(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear."""
    inputs, outputs = getattr(linear, "inputs", None), getattr(linear, "outputs", None)
    assert isinstance(inputs, int) and isinstance(outputs, int), f"{linear} is no linear of ours"
    return inputs, outputs


def _device(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers()])).device


def _endings(names: tuple[str, str]) -> Iterator[str]:
    """What a user may have meant: the last part and the last two parts of each name."""
    for name in names:
        parts = name.split(".")
        yield parts[-1]
        yield ".".join(parts[-2:])

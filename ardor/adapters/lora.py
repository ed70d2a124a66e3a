"""Low-rank adapters on linear maps: which are wrapped, and what they compute.

Axes: R adapter rank, E experts.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace as dataclass_replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ardor.adapters.config import ALL_LINEAR, LoraConfig, ends_with, scale_of
from ardor.adapters.embedding import (
    AdaptedHead,
    LoraEmbedding,
    SavedModule,
    TrainableHead,
    TrainableTokens,
)
from ardor.adapters.initial import Sources, Start, dense_weight, device_of, starts
from ardor.adapters.lowrank import adapted, added, lowered
from ardor.arch.linear import place_of
from ardor.errors import ConfigError


class _Adapted(nn.Module):
    """What an adapted linear and adapted experts share."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    offset_A: Tensor | None
    offset_B: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: int | float,
        dropout: int | float = 0.0,
        *,
        rslora: bool = False,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.inputs, self.outputs = size_of(base)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora

    @property
    def scale(self) -> float:
        return scale_of(self.r, self.alpha, rslora=self.rslora)

    def begin(self, a: Tensor, b: Tensor, *, offset: bool) -> None:
        """Take A and B; with `offset` their product is taken off again, for good."""
        device = device_of(self.base)
        # Contiguous: fused optimizers walk through memory, and singular vectors come transposed.
        a, b = (t.float().to(device).contiguous() for t in (a, b))
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        held = (t.detach().clone() if offset else None for t in (self.lora_A, self.lora_B))
        for name, tensor in zip(("offset_A", "offset_B"), held, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """A and B with what is taken off beside them, as a plain adapter of the same scale."""
        if self.offset_A is None or self.offset_B is None:
            return self.lora_A, self.lora_B
        a = torch.cat([self.lora_A, self.offset_A], -2)
        return a, torch.cat([self.lora_B, -self.offset_B], -1)

    def delta(self) -> Float32[Tensor, "... out in"]:
        """scale * B A, what the adapter adds to the weight (before DoRA's magnitudes)."""
        a, b = self.whole
        return self.scale * (b @ a)

    def merged(self, weight: Float32[Tensor, "... out in"]) -> Float32[Tensor, "... out in"]:
        """What the adapter makes of a weight, unrounded."""
        return weight + self.delta()

    def extra_repr(self) -> str:
        taken = "" if self.offset_A is None else ", what it began with is taken off"
        return (
            f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}, "
            f"rslora={self.rslora}{taken}"
        )


class LoraLinear(_Adapted):
    """y = base(x) + scale * B(A(dropout(x))), with A and B in float32, computed in x.dtype.

    A is uniform in +-1/sqrt(in) and B zero unless `start` says otherwise, so that a fresh adapter
    changes nothing. With `dora` each output of the sum (without its bias) is brought to a trained
    magnitude: times m / |row of the adapted weight|, the norm taken for a constant. With `bias` B
    has a bias, zero at first. `base` is any linear module with `inputs`, `outputs` and a forward,
    and is frozen.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353,
    equations 5 and 6, and section 4.3 for the constant; the initialisation is PEFT's.
    """

    lora_B_bias: nn.Parameter | None  # (out,)
    lora_magnitude_vector: nn.Parameter | None  # (out,)
    squares: Tensor | None  # (out,): of the norms of the base's rows

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: int | float,
        dropout: int | float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
        bias: bool = False,
        start: Start | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, r, alpha, dropout, rslora=rslora)
        if start is None:
            start = starts("", base, r, self.scale, LoraConfig(), Sources())(generator)[0]
        self.begin(start.a, start.b, offset=start.offset)
        self._norms: tuple[tuple[int, int], Tensor] | None = None
        self.register_buffer("squares", None, persistent=False)
        self.lora_B_bias = None
        if bias:
            self.lora_B_bias = nn.Parameter(torch.zeros(self.outputs, device=device_of(base)))
        self.lora_magnitude_vector = None
        if dora:
            self.squares = dense_weight(base).square().sum(1)
            self.lora_magnitude_vector = nn.Parameter(self.norms().clone())

    @torch.no_grad()
    def norms(self) -> Float32[Tensor, "out"]:
        """Of the rows of the adapted weight W + D, which is never formed: |W|^2 + 2 W.D + |D|^2."""
        versions = (self.lora_A._version, self.lora_B._version)
        if not self.training and self._norms is not None and self._norms[0] == versions:
            return self._norms[1]
        assert self.squares is not None
        a, b = self.whole
        across = F.linear(dense_weight(self.base), a)  # (out, R)
        mixed = 2 * across + self.scale * (b @ (a @ a.T))
        found = (self.squares + self.scale * (b * mixed).sum(1)).clamp(min=0).sqrt()
        self._norms = (versions, found)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLinear":
        self._norms = None  # it may lie on another device now
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> "LoraLinear":
        self._norms = None  # an optimizer may change what counts no versions
        return super().train(mode)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        rows = x.reshape(-1, self.inputs)
        if self.dropout and self.training:
            b = self.lora_B
            low = lowered(F.dropout(rows, self.dropout), self.lora_A)
            if self.offset_A is not None and self.offset_B is not None:
                low = torch.cat([low, lowered(rows, self.offset_A)], -1)
                b = torch.cat([b, -self.offset_B], 1)
            flat = added(self.base(rows), low, b, self.scale)
        else:
            flat = adapted(self.base, rows, *self.whole, self.scale)
        if self.lora_B_bias is not None:
            flat = torch.add(flat, self.lora_B_bias.to(flat.dtype), alpha=self.scale)
        if self.lora_magnitude_vector is not None:
            gain = (self.lora_magnitude_vector / self.norms()).to(x.dtype)
            bias: Any = getattr(self.base, "bias", None)
            shift = None if bias is None else bias.to(x.dtype)
            flat = flat * gain if shift is None else (flat - shift) * gain + shift
        return flat.view(*x.shape[:-1], self.outputs)

    def merged(self, weight: Float32[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
        found = super().merged(weight)
        if self.lora_magnitude_vector is None:
            return found
        return found * (self.lora_magnitude_vector / self.norms())[:, None]

    def extra_repr(self) -> str:
        dora = "" if self.lora_magnitude_vector is None else ", dora"
        return super().extra_repr() + dora + ("" if self.lora_B_bias is None else ", bias")


class LoraExperts(_Adapted):
    """An adapter of its own on the same linear map of every expert: A (E, R, in), B (E, out, R).

    `base` is any module with `count`, `inputs`, `outputs` and the map `of(expert, x)`.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: int | float,
        dropout: int | float = 0.0,
        *,
        rslora: bool = False,
        start: list[Start],
    ):
        super().__init__(base, r, alpha, dropout, rslora=rslora)
        a, b = (torch.stack(parts) for parts in zip(*((s.a, s.b) for s in start), strict=True))
        self.begin(a, b, offset=start[0].offset)
        self.count = len(start)
        self._base: Any = base

    @property
    def bias(self) -> nn.Parameter | None:
        found: Any = getattr(self.base, "bias", None)
        return found

    def of(self, expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        b = self.lora_B[expert]
        low = lowered(F.dropout(x, self.dropout, self.training), self.lora_A[expert])
        if self.offset_A is not None and self.offset_B is not None:
            low = torch.cat([low, lowered(x, self.offset_A[expert])], -1)
            b = torch.cat([b, -self.offset_B[expert]], 1)
        return added(self._base.of(expert, x), low, b, self.scale)


Wrapper = LoraLinear | LoraExperts | LoraEmbedding | TrainableTokens | SavedModule
LowRank = LoraLinear | LoraExperts | LoraEmbedding


def add_lora(
    decoder: nn.Module,
    config: LoraConfig,
    *,
    names: Callable[[str], str] = str,
    generator: torch.Generator | None = None,
    sources: Sources | None = None,
) -> tuple[str, ...]:
    """Freeze `decoder` and wrap the modules that `config` targets; their names, in order.

    `names` gives the name that the checkpoint has for a module of ours; targets may use either.
    Weights are drawn in the order of the names, so one generator state gives one adapter.

    Raises: ConfigError for a target that matches nothing (with the nearest names), a rank above
        the sides of a matrix, a beginning that cannot be had, token ids that are no rows, and a
        decoder that already has adapters; before anything is changed.
    """
    if any(True for _ in wrapped_modules(decoder)):
        raise ConfigError("this model already has an adapter; merge it before adding another")
    targets = select(decoder, config, names)
    rows = config.token_rows  # checked before anything is changed
    saved = select_saved(decoder, config, names)
    for name in rows:
        if name in targets or name in saved:
            raise ConfigError(
                f"{name} is in trainable_token_indices and in "
                f"{'target_modules' if name in targets else 'modules_to_save'}; drop one"
            )
    ranks = {name: config.rank((name, names(name))) for name in targets}
    _check_ranks(decoder, ranks)
    if not targets and not rows and not saved:
        raise ConfigError("no module would be trained: target_modules leaves none")
    draws = _draws(decoder, config, ranks, names, sources or Sources())
    decoder.requires_grad_(False)
    add_token_rows(decoder, rows)
    for name, draw in draws.items():
        wrap(decoder, name, draw(generator))
    for name in saved:
        wrap(decoder, name, SavedModule(decoder.get_submodule(name)))
    return targets


def wrap(decoder: nn.Module, name: str, module: nn.Module) -> None:
    """Put an adapted module in its place, and with an embedding the head that is tied to it."""
    replace(decoder, name, module)
    if isinstance(module, LoraEmbedding) and getattr(decoder, "lm_head", None) is None:
        replace(decoder, "lm_head", AdaptedHead(module))


def _draws(
    decoder: nn.Module,
    config: LoraConfig,
    ranks: Mapping[str, int],
    names: Callable[[str], str],
    sources: Sources,
) -> dict[str, Callable[[torch.Generator | None], LowRank]]:
    """What makes each adapted module; everything that can be refused is refused here."""
    found: dict[str, Callable[[torch.Generator | None], LowRank]] = {}
    for name, r in ranks.items():
        base, alpha = decoder.get_submodule(name), config.alpha((name, names(name)))
        if name == "embed_tokens":
            found[name] = _embedding_draw(base, r, alpha, config)
            continue
        if config.use_dora and is_experts(base):
            raise ConfigError(
                f"use_dora cannot adapt {name}: PEFT has no magnitudes for experts; leave them out "
                "(exclude_modules='.*experts.*'), or train without use_dora"
            )
        if config.lora_bias and is_experts(base):
            raise ConfigError(
                f"lora_bias cannot adapt {name}: PEFT has no biases for experts; leave them out "
                "(exclude_modules='.*experts.*'), or train without lora_bias"
            )
        scale = scale_of(r, alpha, rslora=config.use_rslora)
        draw = starts(name, base, r, scale, config, sources)
        kept = {"dropout": config.lora_dropout, "rslora": config.use_rslora}

        def made(
            generator: torch.Generator | None,
            base: nn.Module = base,
            r: int = r,
            alpha: int | float = alpha,
            draw: Callable[..., list[Start]] = draw,
            kept: dict[str, Any] = kept,
        ) -> LowRank:
            start = draw(generator)
            if is_experts(base):
                return LoraExperts(base, r, alpha, start=start, **kept)
            own = {"dora": config.use_dora, "bias": config.lora_bias}
            return LoraLinear(base, r, alpha, start=start[0], **own, **kept)

        found[name] = made
    return found


def _embedding_draw(
    base: nn.Module, r: int, alpha: int | float, config: LoraConfig
) -> Callable[[torch.Generator | None], LowRank]:
    variants = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
    begins = config.init_lora_weights in ("default", "gaussian", "eva")
    if any(variants.values()) or not begins:
        beginning = f"init_lora_weights={config.init_lora_weights}"
        what = next((name for name, on in variants.items() if on), beginning)
        raise ConfigError(
            f"{what} is for linear maps, and embed_tokens is a table; leave embed_tokens out of "
            "target_modules (modules_to_save trains it in full)"
        )
    return lambda generator: LoraEmbedding(
        base, r, alpha, rslora=config.use_rslora, generator=generator
    )


def _check_ranks(decoder: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raises: ConfigError for a rank above the smaller side of its matrix."""
    wrong = {}
    for name, r in ranks.items():
        module = decoder.get_submodule(name)
        sides = module.get_parameter("weight").shape if name == "embed_tokens" else size_of(module)
        if r > min(sides):
            wrong[name] = f"{name} ({' x '.join(map(str, sides))}, rank {r})"
    if wrong:
        shown = ", ".join([*wrong.values()][:3]) + (" and more" if len(wrong) > 3 else "")
        leaf = next(iter(wrong)).rpartition(".")[2]
        raise ConfigError(
            f"the rank is larger than the matrix in {len(wrong)} of {len(ranks)} modules: {shown}; "
            f"set a lower lora_r, or one for these: rank_pattern {{{leaf!r}: N}}, or leave them "
            "out with exclude_modules"
        )


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


def select(decoder: nn.Module, config: LoraConfig, names: Callable[[str], str]) -> tuple[str, ...]:
    """The modules of `decoder` that are adapted, by our names, in the decoder's order.

    Raises: ConfigError for a target or an exclusion that matches nothing, with what there is.
    """
    linears, targets = linear_names(decoder), config.target_modules
    both = {name: (name, names(name)) for name in linears}
    if hasattr(decoder, "embed_tokens"):
        both = {"embed_tokens": ("embed_tokens", names("embed_tokens"))} | both
    _check_excluded(config, both)
    if targets == ALL_LINEAR:
        found = tuple(
            name
            for name in linears
            if place_of(decoder, name) == "layers"
            and min(size_of(decoder.get_submodule(name))) > 1  # a gate of one output has no rank
            and not any(config.excludes(full) for full in both[name])
        )
        if not found and not config.modules_to_save:
            raise ConfigError("this model has no linear maps in its layers that could be adapted")
        return found
    if targets or not (config.modules_to_save or config.token_rows):
        _check_targets(decoder, config, both)
    return tuple(
        name
        for name, pair in both.items()
        if any(config.targets(full) for full in pair)
        and not any(config.excludes(full) for full in pair)
    )


def _check_targets(
    decoder: nn.Module, config: LoraConfig, both: Mapping[str, tuple[str, str]]
) -> None:
    rest = f"{ALL_LINEAR!r} takes every linear of the layers"
    if isinstance(config.target_modules, str):
        if not any(config.targets(full) for pair in both.values() for full in pair):
            raise ConfigError(
                f"target_modules={config.target_modules!r} as a regular expression for whole names "
                f"matches no linear of this model, such as "
                f"{', '.join(pair[1] for pair in [*both.values()][1:4])}; {rest}"
            )
        return
    for target in config.target_modules:
        if any(ends_with(full, target) for pair in both.values() for full in pair):
            continue
        if target == "lm_head" and hasattr(decoder, "lm_head"):
            raise ConfigError(
                "target module 'lm_head': this model's head is its embedding; target embed_tokens, "
                "and both follow"
            )
        raise ConfigError(
            f"target module {target!r} matches no linear of this model, nor embed_tokens; "
            f"{_there_is(target, both.values())}; {rest}"
        )
    if not any(config.targets(full) for pair in both.values() for full in pair):
        raise ConfigError(
            f"target_modules={list(config.target_modules)} match, but layers_to_transform="
            f"{list(config.layers_to_transform)} and exclude_modules leave none of them"
        )


def _check_excluded(config: LoraConfig, both: Mapping[str, tuple[str, str]]) -> None:
    excluded = config.exclude_modules
    for entry in filter(None, [excluded] if isinstance(excluded, str) else excluded):
        value = entry if isinstance(excluded, str) else (entry,)
        alone = dataclass_replace(config, exclude_modules=value, modules_to_save=())
        heads = ("lm_head", "embed_tokens")  # out of reach of "all-linear" in any model
        if not any(alone.excludes(full) for pair in (heads, *both.values()) for full in pair):
            raise ConfigError(
                f"exclude_modules: {entry!r} matches no linear of this model, so that it leaves "
                f"nothing out; {_there_is(entry, both.values())}"
            )


def select_saved(
    decoder: nn.Module, config: LoraConfig, names: Callable[[str], str]
) -> tuple[str, ...]:
    """The modules that are trained in full, by our names.

    Raises: ConfigError for an entry that matches no module with a weight of its own.
    """
    both = {
        name: (name, names(name))
        for name, module in decoder.named_modules()
        if name
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and getattr(module, "count", None) is None
    }
    for entry in config.modules_to_save:
        if any(ends_with(full, entry) for pair in both.values() for full in pair):
            continue
        if entry == "lm_head" and getattr(decoder, "lm_head", ...) is None:
            raise ConfigError(
                "modules_to_save names lm_head, but this model's head is its embedding; name "
                "embed_tokens, and both are trained"
            )
        raise ConfigError(
            f"modules_to_save: {entry!r} matches no module with a full weight of its own; "
            f"{_there_is(entry, both.values())}"
        )
    return tuple(
        name
        for name, pair in both.items()
        if any(ends_with(full, entry) for full in pair for entry in config.modules_to_save)
    )


def linear_names(decoder: nn.Module) -> list[str]:
    """The linears of the layers, experts' too, and the head, adapted or not; nothing inside one."""
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


def is_tied(decoder: nn.Module) -> bool:
    """Whether the head of `decoder` is its embedding, adapted or not."""
    head = getattr(decoder, "lm_head", ...)
    return head is None or isinstance(head, AdaptedHead)


def is_experts(module: nn.Module) -> bool:
    """Whether it is the same linear map of several experts."""
    return getattr(module, "count", None) is not None and hasattr(module, "of")


def wrapped_modules(decoder: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Everything an adapter put in front of a module, with its name; heads follow embeddings."""
    for name, module in decoder.named_modules():
        if isinstance(module, Wrapper):
            yield name.removesuffix(".tokens"), module  # of a head's rows


def lora_modules(decoder: nn.Module) -> Iterator[tuple[str, LoraLinear | LoraExperts]]:
    """The adapted linears, experts' too, with their names."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear | LoraExperts):
            yield name, module


def lora_parameters(decoder: nn.Module) -> list[nn.Parameter]:
    """What an adapter trains: A, B, magnitudes, trainable token rows and modules in full."""
    found = {}
    for module in decoder.modules():
        if isinstance(module, SavedModule):
            found |= {id(p): p for p in module.copy.parameters()}
        elif isinstance(module, Wrapper):
            own = module.named_parameters(recurse=False)
            found |= {id(parameter): parameter for _, parameter in own}
    return list(found.values())


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


def _there_is(wanted: str, names: Iterable[tuple[str, str]]) -> str:
    """The nearest names, and the last part of every one."""
    pairs = [*names]
    known = sorted({end for pair in pairs for end in _endings(pair)})
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    last = sorted({full.rpartition(".")[2] for pair in pairs for full in pair})
    there = f"there are {', '.join(last)}"
    return f"did you mean {', '.join(near)}? {there}" if near else there


def _endings(names: tuple[str, str]) -> Iterator[str]:
    """What a user may have meant: the last part and the last two parts of each name."""
    for name in names:
        parts = name.split(".")
        yield parts[-1]
        yield ".".join(parts[-2:])

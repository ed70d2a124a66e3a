"""What to adapt, how strongly, and from where to start: PEFT's settings under PEFT's names."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ardor.errors import ConfigError

T = TypeVar("T")

ALL_LINEAR = "all-linear"
TOKEN_OWNERS = ("embed_tokens", "lm_head")  # modules whose rows can be trained one by one

# How A and B begin; see ardor.adapters.initial.
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly; the names are PEFT's.

    `target_modules` is "all-linear" (every linear of the layers, experts too, never the head),
    another string as a regular expression for whole names, or endings of module names: "q_proj",
    "mixer.q_proj". Names are ours or the checkpoint's. `modules_to_save` are trained in full, as
    copies. Keys of the patterns are regular expressions for the ends of names; the first wins.
    Rows of `trainable_token_indices` are trained in full: ids for the embedding (and the head tied
    to it), or {"embed_tokens": ids, "lm_head": ids}.
    """

    r: int = 16
    lora_alpha: int | float = 32
    lora_dropout: int | float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False  # scale by alpha / sqrt(r); Kalajdzievski 2023, arXiv:2312.03732
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    use_dora: bool = False  # a trained magnitude of each output; Liu et al. 2024, arXiv:2402.09353
    init_lora_weights: str = "default"
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()  # what precedes a layer's number; (): whatever does
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    lora_bias: bool = False  # a trained bias of B, which the scale multiplies too

    def __post_init__(self) -> None:
        for name, r in {"lora_r": self.r, **_named("rank_pattern", self.rank_pattern)}.items():
            if r < 1:
                raise ConfigError(f"{name}={r} is no rank; set 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} is outside [0, 1)")
        if not is_init(self.init_lora_weights):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is not known; choose one of "
                f"{', '.join(INITS)} or pissa_niter_N"
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias and use_dora do not go together, as in PEFT; choose one")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={list(self.layers_to_transform)} acts on a list of "
                f"target_modules, not on {self.target_modules!r}; name the modules, or put the "
                "layers in a regular expression"
            )
        if self.layers_pattern and not self.layers_to_transform:
            raise ConfigError("layers_pattern says where layers_to_transform counts; give both")
        for name in ("target_modules", "exclude_modules"):
            _check_regex(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                _check_regex(name, key)

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

    @property
    def saves_rank(self) -> int:
        """The rank on disk over that in training: twice where what it began with is taken off."""
        return 2 if self.init_lora_weights.startswith(("pissa", "olora")) else 1

    def rank(self, names: Iterable[str]) -> int:
        """The rank of a module that has these names."""
        return by_pattern(self.rank_pattern, names, self.r)

    def alpha(self, names: Iterable[str]) -> int | float:
        """The alpha of a module that has these names."""
        return by_pattern(self.alpha_pattern, names, self.lora_alpha)

    def targets(self, name: str) -> bool:
        """Whether a module of that whole name is adapted. "all-linear" is not for this to say.

        Source: PEFT 0.21, tuners_utils.check_target_module_exists.
        """
        if self.excludes(name):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True  # a whole name means that module, whatever its layer
        if not any(ends_with(name, target) for target in self.target_modules):
            return False
        if not self.layers_to_transform:
            return True
        index = layer_index(name, self.layers_pattern)
        return index is not None and index in self.layers_to_transform

    def excludes(self, name: str) -> bool:
        """Whether that module stays as it is, or is trained in full."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            found = bool(excluded) and re.fullmatch(excluded, name) is not None
        else:
            found = any(ends_with(name, entry) for entry in excluded)
        return found or any(
            re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in self.modules_to_save
        )


def is_init(name: str) -> bool:
    """Whether there is a beginning of that name."""
    return name in INITS or PISSA_NITER.fullmatch(name) is not None


def scale_of(r: int, alpha: int | float, *, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(r) if rslora else r)


def by_pattern(patterns: Mapping[str, T], names: Iterable[str], default: T) -> T:
    """The value of the first key that is a regular expression for the end of one of `names`."""
    known = [*names]
    for key, value in patterns.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in known):
            return value
    return default


def ends_with(name: str, ending: str) -> bool:
    """Whether the last dotted parts of `name` are `ending`: PEFT's rule for lists of targets."""
    return name == ending or name.endswith(f".{ending}")


def layer_index(name: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The number of the layer in a module's name: the first number, or that after a pattern."""
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        found = (re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", name) for p in patterns)
        match = next((one for one in found if one), None)
    return None if match is None else int(match["idx"])


def _check_regex(name: str, value: str | tuple[str, ...]) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(
                f"{name}={value!r} is no regular expression: {error}; for a single name, give a "
                "list of one"
            ) from None


def _named(name: str, values: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}[{key!r}]": value for key, value in values.items()}

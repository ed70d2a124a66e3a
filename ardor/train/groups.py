"""Which parameters train, and at which share of the learning rate: both by patterns of names.

A pattern is a regular expression that is searched in a parameter's name, ours
(layers.0.mixer.q_proj.weight) or the checkpoint's (model.layers.0.self_attn.q_proj.weight).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ardor.errors import ConfigError
from ardor.form import Native
from ardor.load import Model
from ardor.train.config import Optimisation

SHOWN = 12  # names in an error


class Share(NamedTuple):
    """What `learning_rates` says of the parameters of a pattern."""

    pattern: str
    rate: float
    times: bool  # of the learning rate, or in its place

    @classmethod
    def parse(cls, text: str) -> "Share":
        """PATTERN=RATE or PATTERN=xFACTOR.

        Raises: ConfigError.
        """
        pattern, equals, value = text.rpartition("=")
        times = value.startswith("x")
        try:
            rate = float(value.removeprefix("x"))
        except ValueError:
            rate = -1.0
        if not (equals and pattern and 0 <= rate < float("inf")):
            raise ConfigError(
                f"found learning_rates {text!r}, expected PATTERN=RATE or PATTERN=xFACTOR, as in "
                "embed_tokens=1e-5 or lm_head=x0.1"
            )
        return cls(pattern, rate, times)


def aliases(model: Model) -> dict[str, str]:
    """The checkpoint's name of each parameter that has one of its own there."""
    found: dict[str, str] = {}
    if isinstance(model.form, Native):
        rules = model.form.rules
        for rule, held in zip(rules.plain, rules.memory, strict=True):
            found |= {name: " ".join(rule.names) for name in held}
    linears = model.form.disk_linears()
    for name, _ in model.decoder.named_parameters():
        linear, _, leaf = name.rpartition(".")
        if name not in found and linear in linears:
            found[name] = f"{linears[linear].name}.{leaf}"
    return found


def choose_trained(
    module: nn.Module, config: Optimisation, names: Mapping[str, str]
) -> tuple[str, ...]:
    """Of what takes a gradient, let only `train_only` and nothing of `freeze` take one; a note.

    Raises: ConfigError for a pattern that matches nothing, or if nothing is left.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    only = _matched("train_only", config.train_only, parameters, names)
    frozen = _matched("freeze", config.freeze, parameters, names)
    if config.train_only:
        frozen |= parameters.keys() - only
    if not frozen:
        return ()
    left = [p.numel() for name, p in parameters.items() if name not in frozen]
    if not left:
        raise ConfigError(
            "freeze and train_only leave nothing to train; the names are "
            + _listed(parameters, names)
        )
    for name in frozen:
        parameters[name].requires_grad_(False)
    held = sum(parameters[name].numel() for name in frozen)
    return (f"frozen by name: {held / 1e6:.2f} M parameters; trained {sum(left) / 1e6:.2f} M",)


def rate_shares(
    parameters: Iterable[str], config: Optimisation, names: Mapping[str, str]
) -> dict[str, float]:
    """What each parameter's learning rate is of the run's. The first pattern that matches counts.

    Raises: ConfigError for a pattern that matches nothing, or a LoRA+ ratio without adapters.
    """
    parameters = list(parameters)
    assert config.learning_rate is not None
    found: dict[str, float] = {}
    if config.loraplus_lr_ratio is not None:
        second = [name for name in parameters if name.rpartition(".")[2].startswith("lora_B")]
        if not second:
            raise ConfigError(
                f"loraplus_lr_ratio={config.loraplus_lr_ratio} is for adapters, and this run "
                "trains none; leave it out, or choose method lora"
            )
        found = dict.fromkeys(second, config.loraplus_lr_ratio)
    for share in reversed([Share.parse(text) for text in config.learning_rates]):
        factor = share.rate if share.times else share.rate / config.learning_rate
        chosen = _matched("learning_rates", (share.pattern,), dict.fromkeys(parameters), names)
        found |= dict.fromkeys(chosen, factor)
    return found


def _matched(
    setting: str,
    patterns: Iterable[str],
    parameters: Mapping[str, object],
    names: Mapping[str, str],
) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            search = re.compile(pattern).search
        except re.error as error:
            raise ConfigError(
                f"{setting} {pattern!r} is no regular expression: {error}; a dot is \\."
            ) from None
        hits = {n for n in parameters if search(n) or search(names.get(n, ""))}
        if not hits:
            raise ConfigError(
                f"{setting} {pattern!r} matches none of the parameters that train; there are "
                + _listed(parameters, names)
            )
        found |= hits
    return found


def _listed(parameters: Iterable[str], names: Mapping[str, str]) -> str:
    """The kinds of names, with N for numbers."""
    kinds = [*dict.fromkeys(re.sub(r"\d+", "N", names.get(n, n)) for n in parameters)]
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more

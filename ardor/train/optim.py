"""The optimizers: what each is made of, who gets which rate, and a state that is saved by name."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ardor.errors import CheckpointError, ConfigError
from ardor.memory.optimizers import is_table
from ardor.train.config import Optim, Optimisation
from ardor.train.lion import Lion
from ardor.train.packages import package
from ardor.train.stepwise import Stepwise

Group = dict[str, Any]
# What AdamWScheduleFree keeps of a group, and changes.
_GROUP_STATE = ("k", "weight_sum", "lr_max", "scheduled_lr")
_NUMBER = ":number"  # ends the names of what is a Python number, not a tensor
_ROUNDING = "rounding"  # the state of the generator that rounds to bfloat16
_PACKAGES: Mapping[Optim, str] = {
    "adamw_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
    "schedule_free_adamw": "schedulefree",
}
_EMPTY = "empty" + _NUMBER  # the state of a parameter that has none yet


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that takes a gradient, by name, in definition order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _adamw(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_epsilon, fused=True)


def _lion(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    return Lion(groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2))


def _sgd(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum)


def _adafactor(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018, arXiv:1804.04235; steps are relative to the size of the weights."""
    return torch.optim.Adafactor(groups, lr=0.0)


def _muon(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    """Jordan et al. 2024, with updates as large as AdamW's: Liu et al. 2025, arXiv:2502.16982."""
    return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")


def _schedule_free(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    """Defazio et al. 2024, arXiv:2405.15682."""
    made = optimizer_package(config.optim).AdamWScheduleFree(
        groups,
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    made.train()
    return made


def _adamw_8bit(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    """Dettmers et al. 2021, arXiv:2110.02861."""
    kind = _eight_bit("AdamW", config)
    betas = (config.adam_beta1, config.adam_beta2)
    return kind(groups, lr=0.0, betas=betas, eps=config.adam_epsilon, optim_bits=8)


def _lion_8bit(groups: list[Group], config: Optimisation) -> torch.optim.Optimizer:
    kind, betas = _eight_bit("Lion", config), (config.adam_beta1, config.adam_beta2)
    return kind(groups, lr=0.0, betas=betas, optim_bits=8)


def _eight_bit(name: str, config: Optimisation) -> Any:
    """bitsandbytes' optimizer, with states of tables in 32 bits, as its paper's section 2.3 asks.

    States of fewer than 4096 numbers have 32 bits too.
    """
    # It tells of kernels that only its 4-bit linears would want.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kind = getattr(optimizer_package(config.optim).optim, name)

    class EightBit(kind):
        def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
            bits = {"optim_bits": 32} if group["table"] else {}
            return super().get_config(gindex, pindex, group) | bits

    return EightBit


def optimizer_package(optim: Optim) -> Any:
    """The package that an optimizer comes from; None for torch's and ours.

    Raises: ConfigError if it is not installed.
    """
    name = _PACKAGES.get(optim)
    return None if name is None else package(name, f"optim={optim}", "pip install 'ardor[optim]'")


OPTIMIZERS: Mapping[Optim, Callable[[list[Group], Optimisation], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "lion": _lion,
    "lion_8bit": _lion_8bit,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
    "schedule_free_adamw": _schedule_free,
}


@dataclass(frozen=True)
class _Member:
    """A torch optimizer of some of the parameters."""

    optimizer: torch.optim.Optimizer
    stepwise: Stepwise | None


class _Home(NamedTuple):
    optimizer: torch.optim.Optimizer
    group: Group
    stepwise: Stepwise | None


class Optimizer:
    """Updates `parameters`, each at its share of the rate, with a state that is saved by name.

    Vectors (norm weights and biases) do not decay. Muon has the matrices within layers; tables,
    heads, vectors and stacked experts beside it have AdamW.

    Raises: ConfigError if a package is missing, or nothing is to be trained.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: Optimisation,
        shares: Mapping[str, float] | None = None,
        home: torch.device | None = None,
    ):
        if not parameters:
            raise ConfigError(
                "there is nothing to train: no parameter takes a gradient; look at freeze, "
                "train_only and target_modules"
            )
        self.parameters = parameters
        narrow = any(p.dtype == torch.bfloat16 for p in parameters.values())
        one_by_one = narrow or home is not None or config.optimizer_in_backward
        self.home = home
        device = next(iter(parameters.values())).device
        self.rounding = torch.Generator(device).manual_seed(config.seed) if narrow else None
        self.members: list[_Member] = []
        self._homes: dict[str, _Home] = {}
        for kind, names in _divided(config.optim, parameters).items():
            groups = _groups(names, parameters, shares or {}, config.weight_decay, one_by_one)
            made = OPTIMIZERS[kind](groups, config)
            stepwise = Stepwise(made, self.rounding, home) if one_by_one else None
            self.members.append(_Member(made, stepwise))
            where = {id(p): group for group in made.param_groups for p in group["params"]}
            for name in names:
                self._homes[name] = _Home(made, where[id(parameters[name])], stepwise)
        if config.optimizer_in_backward:
            self._squares = torch.zeros((), dtype=torch.float64)
            for name, parameter in parameters.items():
                parameter.register_post_accumulate_grad_hook(self._step_at_once(name))
        self.in_backward = config.optimizer_in_backward

    @property
    def param_groups(self) -> list[Group]:
        return [group for member in self.members for group in member.optimizer.param_groups]

    def set_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate * group["share"]

    def step(self) -> None:
        """Update every parameter by its gradient, unless the backward pass did."""
        if self.in_backward:
            return
        for member in self.members:
            if member.stepwise is None:
                member.optimizer.step()
                continue
            for group in member.optimizer.param_groups:
                member.stepwise.step(group["params"][0])

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step_at_once(self, name: str) -> Callable[[Tensor], None]:
        parameter, stepwise = self.parameters[name], self._homes[name].stepwise
        assert stepwise is not None

        def step(_: Tensor) -> None:
            assert parameter.grad is not None
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
            self._squares += square.to(self._squares.device)
            if square.isfinite():  # else the trainer stops, with these weights as they were
                stepwise.step(parameter)
            parameter.grad = None

        return step

    def norm_in_backward(self) -> float:
        """The global norm of the gradients that were used up since it was asked for last."""
        norm = float(self._squares.sqrt())
        self._squares.zero_()
        return norm

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within, parameters are what the model is to be judged by and saved as.

        That differs from what is trained for schedule-free optimizers, which average. After it the
        trained ones are back, bit for bit.
        """
        averaging: list[Any] = [m.optimizer for m in self.members if hasattr(m.optimizer, "eval")]
        if not averaging:
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        for optimizer in averaging:
            optimizer.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(trained[name])
            for group in self.param_groups:
                if "train_mode" in group:
                    group["train_mode"] = True

    def state(self) -> dict[str, Tensor]:
        """What it remembers, named "<parameter>|<quantity>"."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            optimizer, group, _ = self._homes[name]
            held = dict(optimizer.state.get(parameter, {}))
            held |= {f"group.{key}": group[key] for key in _GROUP_STATE if key in group}
            if hasattr(optimizer, "eval"):
                # A copy: while the weights are written, `parameter` is what is saved as them.
                held["trained"] = parameter.detach().clone()
            for quantity, value in held.items():
                if quantity.startswith("qmap"):
                    continue  # a constant of the format
                if isinstance(value, Tensor):
                    found[f"{name}|{quantity}"] = value
                else:
                    kind = torch.int64 if isinstance(value, int) else torch.float64
                    found[f"{name}|{quantity}{_NUMBER}"] = torch.tensor(value, dtype=kind)
            if not held:
                found[f"{name}|{_EMPTY}"] = torch.tensor(0)
        if self.rounding is not None:
            found[_ROUNDING] = self.rounding.get_state()
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, bit for bit.

        Raises: CheckpointError naming parameters whose state is missing, or state without a
        parameter.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key == _ROUNDING and self.rounding is not None:
                self.rounding.set_state(value)
                continue
            name, _, quantity = key.partition("|")
            states.setdefault(name, {})[quantity] = value
        if differing := sorted(states.keys() ^ self.parameters.keys()):
            raise CheckpointError(
                f"the optimizer state does not fit the parameters being trained: {differing[:5]}; "
                "resume with the settings the run was started with"
            )
        for name, parameter in self.parameters.items():
            self._restore_one(parameter, self._homes[name], states[name])

    def _restore_one(self, parameter: nn.Parameter, home: _Home, state: dict[str, Tensor]) -> None:
        optimizer: Any = home.optimizer
        held: dict[str, Any] = {}
        for quantity, value in state.items():
            if quantity == _EMPTY:
                continue
            plain = quantity.removesuffix(_NUMBER)
            if plain == "trained":
                with torch.no_grad():
                    parameter.copy_(value)
            elif plain.startswith("group."):
                home.group[plain.removeprefix("group.")] = value.item()
            elif plain != quantity:
                held[plain] = value.item()
            else:  # the step count too, as fused AdamW wants it
                held[plain] = value.to(parameter.device if self.home is None else self.home)
        for number, table in (("1", "dynamic"), ("2", "udynamic")):
            if held.get(f"state{number}") is None or held[f"state{number}"].dtype != torch.uint8:
                continue
            if table not in optimizer.name2qmap:
                optimizer.fill_qmap()
            optimizer.name2qmap[table] = optimizer.name2qmap[table].to(parameter.device)
            held[f"qmap{number}"] = optimizer.name2qmap[table]
        if held:
            optimizer.state[parameter] = held


def _divided(optim: Optim, parameters: dict[str, nn.Parameter]) -> dict[Optim, list[str]]:
    """Which optimizer has which parameters."""
    if optim != "muon":
        return {optim: [*parameters]}
    hidden = [n for n, p in parameters.items() if p.ndim == 2 and not is_table(n)]
    rest = [name for name in parameters if name not in {*hidden}]
    divided: dict[Optim, list[str]] = {"muon": hidden, "adamw": rest}
    return {kind: names for kind, names in divided.items() if names}


def _groups(
    names: list[str],
    parameters: dict[str, nn.Parameter],
    shares: Mapping[str, float],
    decay: float,
    one_by_one: bool,
) -> list[Group]:
    """Parameters that are treated alike, in their order; one by one where they are stepped so."""
    found: dict[Any, Group] = {}
    for name in names:
        facts = {
            "weight_decay": decay if parameters[name].ndim > 1 else 0.0,
            "share": shares.get(name, 1.0),
            "table": is_table(name),
        }
        key = name if one_by_one else tuple(facts.values())
        found.setdefault(key, {"params": [], **facts})["params"].append(parameters[name])
    return [*found.values()]

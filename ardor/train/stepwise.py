"""Optimizer steps of one parameter at a time.

That is what updates in the backward pass, states that wait in another memory, and weights in
bfloat16 have in common: while one parameter is updated, and only then, it has all it needs in
float32 on its own device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor, nn


def round_stochastically(
    x: Float32[Tensor, "*shape"], generator: torch.Generator | None = None
) -> BFloat16[Tensor, "*shape"]:
    """One of the two bfloat16 numbers around each of `x`, the nearer the likelier: the mean is x.

    Rounding to the nearest would lose every update below half the distance of two neighbours,
    which is all of them at usual learning rates.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3; for bfloat16, arXiv:2010.06192.
    """
    bits = x.view(torch.int32)
    # Below the bits that bfloat16 keeps.
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=x.device
    )
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


class Stepwise:
    """Steps `optimizer`, which has one group for each parameter, one parameter at a time.

    Numbers in bfloat16, weights and states, are float32 during their step and rounded
    stochastically after it, by `generator`: not PyTorch's own, from which processes that train one
    model together draw differently. With `home`, states wait there and visit the parameter's
    device.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator | None = None,
        home: torch.device | None = None,
    ):
        self.optimizer, self.generator, self.home = optimizer, generator, home
        self._groups = {group["params"][0]: group for group in optimizer.param_groups}
        assert len(self._groups) == len(optimizer.param_groups)

    def step(self, parameter: nn.Parameter) -> None:
        """Update it by its gradient."""
        if parameter.grad is None:
            return
        with self._alone(self._groups[parameter]) as group, torch.no_grad():
            if parameter.dtype == torch.bfloat16:
                self._in_float32(parameter, group)
            else:
                self._visit(parameter)
                self.optimizer.step()
        state = self.optimizer.state[parameter]
        if self.home is not None:
            for name, value in state.items():
                if isinstance(value, Tensor) and not name.startswith("qmap"):
                    state[name] = value.to(self.home)

    @contextmanager
    def _alone(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        everyone = self.optimizer.param_groups
        self.optimizer.param_groups = [group]
        try:
            yield group
        finally:
            self.optimizer.param_groups = everyone

    def _visit(self, parameter: Tensor) -> None:
        state = self.optimizer.state[parameter]
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(parameter.device)

    def _in_float32(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        states = self.optimizer.state
        wide = nn.Parameter(parameter.float())
        wide.grad = parameter.grad.float()
        if held := states.pop(parameter, None):
            states[wide] = {name: _wider(value, parameter) for name, value in held.items()}
        group["params"] = [wide]
        try:
            self.optimizer.step()
        finally:
            group["params"] = [parameter]
        parameter.copy_(round_stochastically(wide, self.generator))
        made = states.pop(wide, {})
        # By name: one that was restored has another order, and each draws from the generator.
        states[parameter] = {n: self._narrower(made[n], parameter) for n in sorted(made)}

    def _narrower(self, value: Any, parameter: Tensor) -> Any:
        """Of states, those that have a number for each of the parameter's."""
        whole = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
        if not whole or value.dtype != torch.float32:
            return value
        return round_stochastically(value, self.generator)


def _wider(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device)
    return value.float() if value.dtype == torch.bfloat16 else value

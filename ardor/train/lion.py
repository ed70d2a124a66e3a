"""Lion: the sign of an interpolated momentum, with one number of state for each parameter."""

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """EvoLved Sign Momentum with decoupled weight decay; every step moves each number by `lr`.

    A learning rate 3 to 10 times below AdamW's suits it.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            mixed, kept = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - rate * decay)
                p.add_(momentum.lerp(p.grad, 1 - mixed).sign_(), alpha=-rate)
                momentum.lerp_(p.grad, 1 - kept)

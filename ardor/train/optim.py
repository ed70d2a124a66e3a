"""AdamW over the parameters that train, its state saved and restored by parameter name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ardor.errors import CheckpointError


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that takes a gradient, by name, in definition order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def adamw(
    parameters: dict[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """PyTorch's fused AdamW; vectors (norm weights and biases) do not decay.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2.
    """
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        fused=True,
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's tensors, named "<parameter>|<quantity>"."""
    return {
        f"{name}|{quantity}": value
        for name, parameter in parameters.items()
        for quantity, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Inverse of `optimizer_state`, bit for bit.

    Raises: CheckpointError naming parameters whose state is missing, or state without a parameter.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors:
        name, _, quantity = key.partition("|")
        state.setdefault(name, {})[quantity] = value
    if differing := sorted(state.keys() ^ parameters.keys()):
        raise CheckpointError(
            f"the optimizer state does not fit the parameters being trained: {differing[:5]}; "
            "resume with the settings the run was started with"
        )
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            quantity: value.to(parameter.device)  # the step count too, as fused AdamW wants it
            for quantity, value in state[name].items()
        }

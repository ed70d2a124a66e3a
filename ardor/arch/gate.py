"""The product that gates a feed-forward."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ardor.arch.spec import Act
from ardor.kernels import gate as kernel
from ardor.kernels.native import available

ACTIVATIONS: Mapping[Act, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
COMPILED: Mapping[Act, kernel.Act] = {"silu": "silu", "gelu_tanh": "gelu"}


def gated(
    act: Act, gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """act(gate) * up. Where it is compiled it is one pass, which keeps gate and up only.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if act not in COMPILED or gate.dtype != up.dtype or not available(gate):
        return ACTIVATIONS[act](gate) * up
    if torch.is_grad_enabled():
        return _Gate.apply(COMPILED[act], gate, up)
    return kernel.forward(COMPILED[act], gate, up)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: kernel.Act, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return kernel.forward(act, gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *kernel.backward(ctx.act, *upstream, *ctx.saved_tensors)

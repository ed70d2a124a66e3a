"""The product that gates a feed-forward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ardor.kernels import gate as kernel
from ardor.kernels.native import available

Activation = Callable[[Tensor], Tensor]


def gated(
    act: Activation, gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """act(gate) * up. The silu of most families is one compiled pass, which keeps gate and up only.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if act is not F.silu or gate.dtype != up.dtype or not available(gate):
        return act(gate) * up
    if torch.is_grad_enabled():
        return _SiluGate.apply(gate, up)
    return kernel.forward(gate, up)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernel.forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        return kernel.backward(*upstream, *ctx.saved_tensors)

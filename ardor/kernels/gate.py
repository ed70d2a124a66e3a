"""act(gate) * up, compiled, in one pass each way. Call it where `native.available(gate)`."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import NAMES, library, threads

Act = Literal["silu", "gelu"]  # gelu: the one by tanh


def forward(
    act: Act, gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """act(gate) * up; both of one dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    getattr(library(), f"{act}_gate_{NAMES[gate.dtype]}")(
        *(tensor.data_ptr() for tensor in (gate, up, y)), y.numel(), threads(y.numel())
    )
    return y


def backward(
    act: Act,
    dy: Float[Tensor, "*shape"],
    gate: Float[Tensor, "*shape"],
    up: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(d gate, d up)"""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    getattr(library(), f"{act}_gate_backward_{NAMES[gate.dtype]}")(
        *(tensor.data_ptr() for tensor in (dy, gate, up, d_gate, d_up)),
        dy.numel(),
        threads(dy.numel()),
    )
    return d_gate, d_up

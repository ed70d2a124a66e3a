"""silu(gate) * up, compiled, in one pass each way. Call it where `native.available(gate)`."""

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.kernels.native import NAMES, library, threads


def forward(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up; both of one dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    getattr(library(), f"silu_gate_{NAMES[gate.dtype]}")(
        *(tensor.data_ptr() for tensor in (gate, up, y)), y.numel(), threads(y.numel())
    )
    return y


def backward(
    dy: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(d gate, d up)"""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    getattr(library(), f"silu_gate_backward_{NAMES[gate.dtype]}")(
        *(tensor.data_ptr() for tensor in (dy, gate, up, d_gate, d_up)),
        dy.numel(),
        threads(dy.numel()),
    )
    return d_gate, d_up

"""The one seam for linear maps: quantized, LoRA-wrapped and sharded linears replace this module."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.kernels.linear import linear


class Linear(nn.Module):
    """y = x W^T + b, computed in the dtype of x whatever the dtype of the stored weight.

    Float32 master weights therefore train with bfloat16 activations: the cast is inside autograd
    and the gradient arrives in the weight's own dtype.
    """

    weight: nn.Parameter  # (out, in)
    bias: nn.Parameter | None  # (out,)

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}"

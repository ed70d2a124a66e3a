"""The one seam for linear maps: quantized, LoRA-wrapped and sharded linears replace this module."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.kernels.linear import linear


def place_of(model: nn.Module, name: str) -> Literal["layers", "head"] | None:
    """Whether the module `name` is in the layers of `model`, is its head, or neither.

    Adapters and quantization take linears of the layers unless told otherwise. A model whose parts
    have other names than Decoder's answers itself, in a method of this name.
    """
    own: Any = getattr(model, "place_of", None)
    if own is not None:
        return own(name)
    if name == "lm_head":
        return "head"
    return "layers" if name.startswith("layers.") else None


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

    def back(self, slope: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows in"]:
        """The slope in x, new, from that in y, where the weight is a constant."""
        return slope @ self.weight.to(slope.dtype)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}"


class LinearHead:
    """logits = finish(x W^T + b), with W and b as arguments.

    Being told apart from other functions, the chunked loss can take the gradient of W in pieces.
    """

    def __init__(self, finish: Callable[[Tensor], Tensor] | None = None):
        self.finish = finish

    def __call__(
        self,
        x: Float[Tensor, "*rows D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, "V"] | None = None,
    ) -> Float[Tensor, "*rows V"]:
        bias = None if bias is None else bias.to(x.dtype)
        logits = linear(x, weight.to(x.dtype), bias)
        return logits if self.finish is None else self.finish(logits)

"""Axes: D model width."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch.spec import Norm as NormSpec


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 and cast to the dtype of x, then times the weight.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the order of the casts is Llama's.
    """

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        unit = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return unit * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std in float32, times the weight plus the bias. Source: arXiv:1607.06450."""

    def __init__(self, width: int, spec: NormSpec):
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), bias, self.eps)


def norm(width: int, spec: NormSpec) -> RMSNorm | LayerNorm:
    return RMSNorm(width, spec) if spec.kind == "rms" else LayerNorm(width, spec)

"""Adapters folded into the weights they adapt."""

from typing import cast

import torch
from torch import Tensor, nn

from ardor.adapters.lora import LoraLinear, TrainableHead, TrainableTokens, lora_modules, replace
from ardor.arch.linear import Linear
from ardor.errors import ConfigError


@torch.no_grad()
def merge(decoder: nn.Module, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Replace every adapted module by a plain one with W + scale * B A; their names.

    The sum is float32, rounded once to the dtype of W. A quantized W is expanded and stays so, in
    `dtype` or else what it was before quantization: quantizing the sum again would erase most of
    the adapter. Trained token rows are written into a copy of their embedding or head. One weight
    is merged at a time, and weights that a file is mapped to are not written to.

    Raises: ConfigError if a merged weight leaves the range of its dtype.
    """
    adapted = list(lora_modules(decoder))
    for name, module in adapted:
        replace(decoder, name, _merged(name, module, dtype))
    return (*(name for name, _ in adapted), *_merge_rows(decoder))


def _merged(name: str, adapted: LoraLinear, dtype: torch.dtype | None) -> Linear:
    base = adapted.base
    dequantized = getattr(base, "dequantized", None)  # a quantized linear, of whatever format
    if dequantized is None and not isinstance(base, Linear | nn.Linear):
        raise ConfigError(f"{name} is a {type(base).__name__}, into which nothing can be merged")
    if dequantized is None:
        weight = base.get_parameter("weight")
        exact, target = weight.float(), weight.dtype
    else:
        exact = dequantized(torch.float32)
        target = dtype or cast(torch.dtype, getattr(base, "original_dtype", torch.float32))
    merged = torch.addmm(exact, adapted.lora_B, adapted.lora_A, alpha=adapted.scale).to(target)
    if not merged.isfinite().all():
        raise ConfigError(
            f"{name} with its adapter leaves the range of {target}; load the base with "
            "dtype=bfloat16 or float32 and merge again, or look for NaN in the adapter"
        )
    with torch.device("meta"):
        linear = Linear(adapted.inputs, adapted.outputs)
    linear.weight = nn.Parameter(merged, requires_grad=False)
    linear.bias = cast(nn.Parameter | None, getattr(base, "bias", None))
    return linear


def _merge_rows(decoder: nn.Module) -> list[str]:
    names = []
    embedding, head = (getattr(decoder, name, None) for name in ("embed_tokens", "lm_head"))
    if isinstance(head, TrainableHead):
        tied = head.tokens is embedding
        replace(decoder, "lm_head", None if tied else _with_rows(head.tokens))
        names += [] if tied else ["lm_head"]
    if isinstance(embedding, TrainableTokens):
        replace(decoder, "embed_tokens", _with_rows(embedding))
        names.insert(0, "embed_tokens")
    return names


def _with_rows(tokens: TrainableTokens) -> nn.Module:
    weight: Tensor = tokens.weight
    tokens.base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return tokens.base

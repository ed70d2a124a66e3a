"""Adapters taken off a model and put back on, and folded into the weights they adapt."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.adapters.embedding import (
    AdaptedHead,
    LoraEmbedding,
    SavedModule,
    TrainableHead,
    TrainableTokens,
)
from ardor.adapters.initial import dense_weight
from ardor.adapters.lora import LoraExperts, LoraLinear, replace, wrapped_modules
from ardor.arch.experts import ExpertLinear
from ardor.arch.linear import Linear
from ardor.errors import ConfigError

Attached = dict[str, nn.Module]
"""The modules that make an adapter, by the places they stand in; each holds what it adapts."""


@dataclass(frozen=True)
class Residual:
    """What is lost of one map's change D = (adapted - trained base), as shares of |D|."""

    name: str
    change: float  # |D| / |W|
    rounding: float  # |stored - (W + D)|: one rounding to 16 bits, or the packing, of the sum
    base: float | None = None  # |W - the base that was trained on|, if they differ
    requantized: float | None = None  # what packing the sum again costs, if it was packed


@dataclass(frozen=True)
class Merged:
    """What was merged, and what `unmerge` needs to undo it exactly."""

    names: tuple[str, ...]
    kept: Attached
    residuals: tuple[Residual, ...] = ()


def detach(decoder: nn.Module) -> Attached:
    """Take an adapter off: every module is what it was before. `attach` puts it back on."""
    found: Attached = {}
    head = getattr(decoder, "lm_head", None)
    if isinstance(head, AdaptedHead | TrainableHead):
        found["lm_head"] = head
        tied = isinstance(head, AdaptedHead) or head.tokens is decoder.get_submodule("embed_tokens")
        base = None if tied or not isinstance(head, TrainableHead) else head.tokens.base
        replace(decoder, "lm_head", base)
    for name, module in [*wrapped_modules(decoder)]:
        found[name] = module
        replace(decoder, name, module.base)
    return found


def attach(decoder: nn.Module, adapter: Attached) -> None:
    """Put an adapter on that was taken off this decoder."""
    for name, module in adapter.items():
        replace(decoder, name, module)


@torch.no_grad()
def merge(
    decoder: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    trained: Callable[[str], Tensor] | None = None,
    packed: Callable[[Tensor], Tensor] | None = None,
    keep: bool = True,
) -> Merged:
    """Replace every adapted module by a plain one with W + scale * B A.

    The sum is float32, rounded once to the dtype of W. A quantized W is expanded and stays so, in
    `dtype` or else what it was before quantization: quantizing the sum again would erase most of
    the adapter. Trained token rows are written into a copy of their embedding or head. One weight
    is merged at a time, and weights that a file is mapped to are not written to. `trained` gives
    the base that a map was trained on, where it is another than here, and `packed` what packing a
    weight again makes of it: both for the residuals alone, which are only computed with `keep`.

    Raises: ConfigError if a merged weight leaves the range of its dtype; the model is as it was.
    """
    kept = detach(decoder)
    residuals: list[Residual] = []
    made: dict[str, nn.Module] = {}
    try:
        for name, module in kept.items():
            if isinstance(module, LoraLinear | LoraExperts):
                made[name], residual = _merged(name, module, dtype, trained, packed, tell=keep)
                residuals += [residual] if residual is not None else []
            else:
                made |= _merged_other(name, module)
    except ConfigError:
        attach(decoder, kept)
        raise
    for name, module in made.items():
        replace(decoder, name, module)
    order = [name for name in _ordered(decoder) if name in made]
    return Merged(tuple(order), kept if keep else {}, tuple(residuals))


def unmerge(decoder: nn.Module, merged: Merged) -> None:
    """Put back what `merge` replaced, bit for bit: the base weights were kept, not recomputed."""
    if not merged.kept:
        raise ConfigError("the base was not kept when this adapter was merged; load it again")
    attach(decoder, merged.kept)


def _ordered(decoder: nn.Module) -> list[str]:
    outside = ("embed_tokens", "lm_head")
    names = [name for name, _ in decoder.named_modules()]
    return [n for n in names if n not in outside] + [n for n in outside if n in names]


def _merged(
    name: str,
    adapted: LoraLinear | LoraExperts,
    dtype: torch.dtype | None,
    trained: Callable[[str], Tensor] | None,
    packed: Callable[[Tensor], Tensor] | None,
    *,
    tell: bool,
) -> tuple[nn.Module, Residual | None]:
    base = adapted.base
    if hasattr(base, "blocks"):
        raise ConfigError(
            f"{name} is held in MXFP4, whose files have no place for a merged map; load a bfloat16 "
            "checkpoint of this model and merge into that, or leave experts out (exclude_modules)"
        )
    if not hasattr(base, "dequantized") and not isinstance(base, Linear | nn.Linear | ExpertLinear):
        raise ConfigError(f"{name} is a {type(base).__name__}, into which nothing can be merged")
    exact = dense_weight(base)
    target = dtype
    if not hasattr(base, "dequantized"):
        target = base.get_parameter("weight").dtype
    elif target is None:
        target = cast(torch.dtype, getattr(base, "original_dtype", torch.bfloat16))
    total = adapted.merged(exact)
    stored = total.to(target)
    if not stored.isfinite().all():
        raise ConfigError(
            f"{name} with its adapter leaves the range of {target}; load the base with "
            "dtype=bfloat16 or float32 and merge again, or look for NaN in the adapter"
        )
    residual = _residual(name, exact, total, stored, trained, packed) if tell else None
    made = plain(base, stored)
    if isinstance(adapted, LoraLinear) and adapted.lora_B_bias is not None:
        made.bias = _merged_bias(name, adapted, adapted.lora_B_bias)
    return made, residual


def _merged_bias(name: str, adapted: LoraLinear, bias: Tensor) -> nn.Parameter:
    own = cast(Tensor | None, getattr(adapted.base, "bias", None))
    if own is None:
        raise ConfigError(
            f"{name} was trained with lora_bias, and the map itself has no bias that could take "
            "it; keep the adapter beside its base"
        )
    total = (own.float() + adapted.scale * bias).to(own.dtype)
    if not total.isfinite().all():
        raise ConfigError(
            f"the bias of {name} with its adapter leaves the range of {own.dtype}; load the base "
            "with dtype=bfloat16 or float32 and merge again, or look for NaN in the adapter"
        )
    return nn.Parameter(total, requires_grad=False)


def plain(base: nn.Module, weight: Float[Tensor, "... out in"]) -> Linear | ExpertLinear:
    """The linear map, or that of all experts, with this weight and the bias of `base`. Frozen."""
    outputs, inputs = weight.shape[-2:]
    with torch.device("meta"):
        made: Linear | ExpertLinear
        if weight.ndim == 3:
            made = ExpertLinear(len(weight), inputs, outputs, bias=False)
        else:
            made = Linear(inputs, outputs)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = cast(nn.Parameter | None, getattr(base, "bias", None))
    return made


def _residual(
    name: str,
    exact: Tensor,
    total: Tensor,
    stored: Tensor,
    trained: Callable[[str], Tensor] | None,
    packed: Callable[[Tensor], Tensor] | None,
) -> Residual:
    change = float((total - exact).norm())
    share = max(change, torch.finfo(torch.float32).tiny)
    base = None if trained is None else float((exact - trained(name)).norm()) / share
    again = None
    if packed is not None:
        maps = total if total.ndim == 3 else total[None]  # of experts each by itself
        again = float(torch.stack([packed(one) - one for one in maps]).norm()) / share
    rounding = float((stored.float() - total).norm()) / share
    return Residual(name, change / float(exact.norm()), rounding, base, again)


def _merged_other(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """What stands in a place of the embedding or head, or of a module trained in full."""
    match module:
        case TrainableTokens() | LoraEmbedding():
            made = _with(module.base, {"weight": module.weight})
            return {name: made}
        case TrainableHead() if name == "lm_head" and not _is_embedding(module):
            return {name: _with(module.tokens.base, {"weight": module.tokens.weight})}
        case SavedModule():
            dtypes = {leaf: p.dtype for leaf, p in module.base.named_parameters()}
            parameters = dict(module.copy.named_parameters())
            return {name: _with(module.base, {n: p.to(dtypes[n]) for n, p in parameters.items()})}
    return {}  # a head that follows its embedding


def _is_embedding(head: TrainableHead) -> bool:
    """Whether the rows are those of an embedding, which merges itself."""
    return not hasattr(head.tokens.base, "inputs")


def _with(module: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """The module with other parameters of its own; the original keeps its."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    for name, tensor in parameters.items():
        made.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return made

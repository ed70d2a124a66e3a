"""Random weights for a decoder that is trained from scratch, by named schemes.

Axes: D model width, L layers.

Whatever the scheme, norms start as the identity, and biases, sinks and routers' corrections at
zero. Embeddings are drawn as matrices are, where the decoder multiplies them by a constant too.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.norm import LayerNorm, RMSNorm

RESIDUAL_WRITERS = ("mixer.o_proj.weight", "down_proj.weight", "token_gate.out_proj.weight")
ZERO = ("bias", "sinks", "correction")
STD = 0.02  # of the schemes that have one


class Matrix(NamedTuple):
    """What a scheme may know of a matrix."""

    name: str
    width: int  # D
    layers: int  # L
    layer: int  # that it is in, counted from 0
    inputs: int  # of the map; the width of a table
    writes: bool  # what it gives is added to the residual stream


class Spread(NamedTuple):
    """A normal distribution around zero, cut at `cutoff` standard deviations."""

    std: float
    cutoff: float | None = None


def _megatron(matrix: Matrix, std: float) -> Spread:
    """`std`, and std / sqrt(2L) for the 2L residual writers: the stream does not grow with depth.

    Source: Shoeybi et al. 2019 (Megatron-LM), arXiv:1909.08053, after GPT-2; OPT,
    arXiv:2205.01068, section 2.2; llama2.c.
    """
    return Spread(std * (2 * matrix.layers) ** -0.5 if matrix.writes else std)


def _gpt2(matrix: Matrix, std: float) -> Spread:
    """As `_megatron`, with half the `std` in the table of positions.

    Source: Radford et al. 2019 (GPT-2), section 2.3; the table in the released code
    (openai/gpt-2, src/model.py: 0.02 for tokens, 0.01 for positions).
    """
    if matrix.name == "embed_positions.weight":
        return Spread(std / 2)
    return _megatron(matrix, std)


def _normal(matrix: Matrix, std: float) -> Spread:
    """`std` everywhere. Source: transformers, where it is `initializer_range`."""
    return Spread(std)


def _truncated(matrix: Matrix, std: float) -> Spread:
    """`std` everywhere, with nothing beyond three of it.

    Source: OLMoE, arXiv:2409.02060, appendix B; OLMo 2's released configurations (init_fn normal,
    init_std 0.02, init_cutoff_factor 3).
    """
    return Spread(std, 3.0)


def _small(matrix: Matrix, std: float) -> Spread:
    """sqrt(2 / 5D), and 2 / (L sqrt(D)) for residual writers; `std` is not used.

    Source: Black et al. 2022 (GPT-NeoX-20B), arXiv:2204.06745, section 2.1.3, after Nguyen and
    Salazar 2019, arXiv:1910.05895, and Wang's Mesh Transformer JAX.
    """
    if matrix.writes:
        return Spread(2.0 / (matrix.layers * matrix.width**0.5))
    return Spread((2.0 / (5 * matrix.width)) ** 0.5)


def _mitchell(matrix: Matrix, std: float) -> Spread:
    """1 / sqrt(inputs), for writers of layer l (from 1) also over sqrt(2l); `std` is not used.

    Cut at three standard deviations. Source: OLMo, arXiv:2402.00838; its code's init_fn mitchell.
    """
    depth = 2 * (matrix.layer + 1) if matrix.writes else 1
    return Spread((matrix.inputs * depth) ** -0.5, 3.0)


SCHEMES: dict[str, Callable[[Matrix, float], Spread]] = {
    "megatron": _megatron,
    "gpt2": _gpt2,
    "normal": _normal,
    "truncated": _truncated,
    "small": _small,
    "mitchell": _mitchell,
}
WITHOUT_STD = ("small", "mitchell")


@torch.no_grad()
def initialise(
    decoder: Decoder, generator: torch.Generator, *, scheme: str = "megatron", std: float = STD
) -> None:
    """Draw every matrix as `scheme` says; the rest starts as this module's docstring says."""
    one_plus = {
        f"{name}.weight"
        for name, module in decoder.named_modules()
        if isinstance(module, RMSNorm | LayerNorm) and module.spec.weight == "one_plus"
    }
    for name, parameter in decoder.named_parameters():
        if name.endswith(ZERO) or name in one_plus:
            parameter.zero_()
        elif "norm" in name or name.endswith("expert_scale"):
            parameter.fill_(1.0)
        else:
            spread = SCHEMES[scheme](_matrix(decoder, name, parameter.shape[-1]), std)
            if spread.cutoff is None:
                parameter.normal_(0.0, spread.std, generator=generator)
            else:
                end = spread.cutoff * spread.std
                torch.nn.init.trunc_normal_(
                    parameter, std=spread.std, a=-end, b=end, generator=generator
                )


def _matrix(decoder: Decoder, name: str, inputs: int) -> Matrix:
    place = re.match(r"layers\.(\d+)\.", name)
    return Matrix(
        name=name,
        width=decoder.spec.width,
        layers=len(decoder.spec.layers),
        layer=int(place[1]) if place else 0,
        inputs=inputs,
        writes=name.endswith(RESIDUAL_WRITERS),
    )

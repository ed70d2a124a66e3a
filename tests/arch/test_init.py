"""Every group of parameters starts with the spread that its scheme's source says."""

from typing import get_args

import pytest
import torch

from ardor.arch.decoder import Decoder
from ardor.arch.init import SCHEMES, initialise
from ardor.arch.spec import Attention, Experts, Layer, Mlp, Norm, QKNorm, Router
from ardor.arch.spec import Decoder as Spec
from ardor.train.config import Init

D, L, F, V = 64, 3, 160, 200
TRUNCATED = 0.98658  # the standard deviation of a unit normal cut at 3


def spec(norm: Norm | None = None, embed_scale: float = 1.0) -> Spec:
    norm = norm or Norm(kind="layer", eps=1e-5, bias=True)
    mixer = Attention(
        heads=4,
        kv_heads=2,
        head_width=16,
        scale=0.25,
        rope=None,
        sinks=True,
        qk_norm=QKNorm(norm=norm),
        qkv_bias=True,
        out_bias=True,
    )
    mlp = Mlp(width=F, act="silu", bias=True)
    experts = Experts(
        count=4,
        expert=mlp,
        router=Router(per_token=2, bias=True, correction=True),
        shared=mlp,
        shared_gated=True,
    )
    return Spec(
        vocab=V,
        width=D,
        layers=tuple(
            Layer(mixer=mixer, ffn=mlp if i == 1 else experts, norm=norm) for i in range(L)
        ),
        norm=norm,
        tied=False,
        max_positions=48,
        learned_positions=True,
        embed_scale=embed_scale,
    )


def started(of: Spec | None = None, **keys) -> dict[str, torch.Tensor]:
    decoder = Decoder(of or spec())
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, 9.0)  # what is left out shows
    initialise(decoder, torch.Generator().manual_seed(0), **keys)
    return {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def expected(scheme: str, name: str, inputs: int, std: float) -> float:
    """By the formulas of the papers, written down once more."""
    writes = "o_proj" in name or "down_proj" in name
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    match scheme:
        case "normal":
            return std
        case "truncated":
            return std * TRUNCATED
        case "megatron" | "gpt2":
            half = scheme == "gpt2" and "positions" in name
            return std / (2 * L) ** 0.5 if writes else std / (2 if half else 1)
        case "small":
            return 2 / L / D**0.5 if writes else (2 / 5 / D) ** 0.5
        case _:
            depth = 2 * (layer + 1) if writes else 1
            return TRUNCATED / (depth * inputs) ** 0.5


@pytest.mark.parametrize("std", [0.02, 0.006])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_has_the_spread_of_its_formula(scheme, std):
    seen = 0
    for name, found in started(scheme=scheme, std=std).items():
        if "norm" in name or found.ndim < 2 or name.endswith("bias"):
            continue
        wanted = expected(scheme, name, found.shape[-1], std)
        # The standard deviation of n draws is off by about 1 / sqrt(2n); five times that.
        assert abs(float(found.std()) / wanted - 1) < 5 / (2 * found.numel()) ** 0.5, name
        assert abs(float(found.mean())) < 5 * wanted / found.numel() ** 0.5, name
        if scheme in ("truncated", "mitchell"):
            assert float(found.abs().max()) <= 3.0001 * wanted / TRUNCATED, name
        seen += 1
    assert seen > 30


def test_schemes_differ_where_their_formulas_do():
    """The comparison above can fail: of two schemes, some group of parameters tells them apart."""
    names = {name: p.shape[-1] for name, p in started().items() if name.endswith("weight")}
    formulas = {s: [expected(s, name, n, 0.02) for name, n in names.items()] for s in SCHEMES}
    assert len({tuple(values) for values in formulas.values()}) == len(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_rest_starts_as_nothing(scheme):
    for name, found in started(scheme=scheme).items():
        if name.endswith(("bias", "sinks", "correction")):
            assert not found.any(), name
        elif "norm" in name:
            assert bool((found == 1).all()), name


def test_a_norm_that_holds_w_minus_1_starts_at_zero():
    found = started(spec(Norm(kind="rms", eps=1e-6, weight="one_plus")))
    norms = [p for name, p in found.items() if "norm" in name]
    assert norms and not any(p.any() for p in norms)


def test_a_multiplier_of_the_embedding_does_not_change_how_it_starts():
    plain, scaled = started(), started(spec(embed_scale=8.0))
    assert torch.equal(plain["embed_tokens.weight"], scaled["embed_tokens.weight"])


def test_the_same_seed_gives_the_same_weights():
    one, two = started(scheme="mitchell"), started(scheme="mitchell")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_flag_knows_the_schemes():
    assert get_args(Init) == tuple(SCHEMES)

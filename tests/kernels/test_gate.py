import pytest
import torch
import torch.nn.functional as F

from ardor.arch.gate import ACTIVATIONS, COMPILED, gated
from ardor.kernels import gate as kernel
from ardor.kernels.native import OFF, library

# What two roundings may differ by, relative to the value; for float32 the exponential's own error,
# and that of its argument, which is up to 30.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6}

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")


def case(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(shape, generator=g)).to(dtype) for _ in range(3)]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("act", COMPILED)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33), (40, 1000)], ids=str)
def test_the_compiled_gate_equals_the_reference_in_value_and_gradient(act, dtype, shape):
    gate, up, upstream = case(dtype, *shape)
    gate.requires_grad_(), up.requires_grad_()
    # In float64: the reference's tanh in float32 cancels where the gate is far below zero.
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    outs = [gated(act, gate, up), ACTIVATIONS[act](wide[0]) * wide[1]]
    gradients = [
        torch.autograd.grad(outs[0], [gate, up], upstream),
        torch.autograd.grad(outs[1], wide, upstream.double()),
    ]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(outs[0].double(), outs[1], **close)
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), reference, **close)
    with torch.no_grad():
        assert torch.equal(gated(act, gate, up), outs[0])
    other = F.gelu(gate) * up  # by erf, which is neither
    if dtype == torch.float32 and gate.numel() > 1:  # the probe could have failed
        assert (other - outs[0]).abs().max() > 1e-4


@needs_compiler
def test_the_ends_of_the_range_and_nan_pass_through():
    gate = torch.tensor([-3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38, float("nan")])
    found = kernel.forward("silu", gate, torch.ones(8))
    torch.testing.assert_close(found[1:], F.silu(gate[1:]), equal_nan=True)
    assert found[0].abs() <= 3  # -3e38 * e^-88 is the nearest that the clamped exponential comes


@needs_compiler
def test_it_takes_silu_in_its_dtypes_and_leaves_the_rest(monkeypatch):
    taken = []
    real = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: taken.append(1) or real(*args))
    gate, up, _ = case(torch.float32, 3, 5)
    gated("silu", gate, up)
    assert taken == [1]
    gated("relu", gate, up)
    gated("silu", gate.double(), up.double())
    gated("silu", gate, up.bfloat16())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gated("silu", gate, up)
    assert taken == [1]


def test_without_a_compiler_the_expression_remains(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv(OFF, "1")
    try:
        gate, up, _ = case(torch.bfloat16, 3, 5)
        assert library() is None
        assert torch.equal(gated("silu", gate, up), F.silu(gate) * up)
    finally:
        monkeypatch.undo()
        library.cache_clear()

import pytest
import torch
import torch.nn.functional as F

from ardor.arch.gate import gated
from ardor.kernels import gate as kernel
from ardor.kernels.native import OFF, library

# What two roundings may differ by, relative to the value; the exponential's own error for float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-6}

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")


def case(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(shape, generator=g)).to(dtype) for _ in range(3)]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33), (40, 1000)], ids=str)
def test_the_compiled_gate_equals_the_reference_in_value_and_gradient(dtype, shape):
    gate, up, upstream = case(dtype, *shape)
    gate.requires_grad_(), up.requires_grad_()
    outs = [gated(F.silu, gate, up), F.silu(gate) * up]
    gradients = [torch.autograd.grad(out, [gate, up], upstream) for out in outs]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(*outs, **close)
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, **close)
    with torch.no_grad():
        assert torch.equal(gated(F.silu, gate, up), outs[0])


@needs_compiler
def test_the_ends_of_the_range_and_nan_pass_through():
    gate = torch.tensor([-3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38, float("nan")])
    found = kernel.forward(gate, torch.ones(8))
    torch.testing.assert_close(found[1:], F.silu(gate[1:]), equal_nan=True)
    assert found[0].abs() <= 3  # -3e38 * e^-88 is the nearest that the clamped exponential comes


@needs_compiler
def test_it_takes_silu_in_its_dtypes_and_leaves_the_rest(monkeypatch):
    taken = []
    real = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: taken.append(1) or real(*args))
    gate, up, _ = case(torch.float32, 3, 5)
    gated(F.silu, gate, up)
    assert taken == [1]
    gated(F.relu, gate, up)
    gated(F.silu, gate.double(), up.double())
    gated(F.silu, gate, up.bfloat16())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gated(F.silu, gate, up)
    assert taken == [1]


def test_without_a_compiler_the_expression_remains(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv(OFF, "1")
    try:
        gate, up, _ = case(torch.bfloat16, 3, 5)
        assert library() is None
        assert torch.equal(gated(F.silu, gate, up), F.silu(gate) * up)
    finally:
        monkeypatch.undo()
        library.cache_clear()

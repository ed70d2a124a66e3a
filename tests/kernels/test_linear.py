import pytest
import torch
import torch.nn.functional as F

from ardor.kernels import linear as kernel
from ardor.kernels.native import OFF, library

SHAPES = [(1, 1), (3, 7), (8, 32), (9, 33), (64, 100), (130, 257)]
RELATIVE = 2.0**-8  # half a step of the result's rounding, and the float32 sum's own error

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")


def case(out: int, inputs: int):
    g = torch.Generator().manual_seed(out * inputs)
    x, weight, bias = (
        torch.randn(shape, generator=g).bfloat16() for shape in ((1, 1, inputs), (out, inputs), out)
    )
    return x, weight, bias


@needs_compiler
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out, inputs", SHAPES)
def test_the_compiled_product_equals_the_exact_one(out, inputs, biased):
    x, weight, bias = case(out, inputs)
    found = kernel.matvec(x, weight, bias if biased else None)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert found.dtype == torch.bfloat16 and found.shape == (1, 1, out)
    size = (x.double().abs() @ weight.double().abs().T + bias.double().abs()).max()
    assert (found.double() - exact).abs().max() <= RELATIVE * size


@needs_compiler
def test_it_takes_one_row_without_gradients_and_leaves_the_rest(monkeypatch):
    taken = []
    real = kernel.matvec
    monkeypatch.setattr(kernel, "matvec", lambda *args: taken.append(1) or real(*args))
    x, weight, _ = case(8, 16)
    with torch.no_grad():
        kernel.linear(x, weight, None)
        assert taken == [1]
        kernel.linear(x.expand(1, 2, 16), weight, None)  # two rows
        kernel.linear(x.float(), weight.float(), None)  # another dtype
        kernel.linear(x, weight.T.contiguous().T, None)  # not row by row in memory
    kernel.linear(x, weight.requires_grad_(), None)
    assert taken == [1]


def test_without_a_compiler_the_same_linear_map_remains(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv(OFF, "1")
    try:
        x, weight, bias = case(5, 33)
        with torch.no_grad():
            assert library() is None
            assert torch.equal(kernel.linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        monkeypatch.undo()
        library.cache_clear()


@needs_compiler
def test_special_values_pass_through():
    weight = torch.tensor([[float("inf")], [float("nan")], [3e38]]).bfloat16()
    found = kernel.matvec(torch.ones(1, 1).bfloat16(), weight, None)
    assert found[0, 0] == float("inf") and found[0, 1].isnan() and found[0, 2] == weight[2, 0]

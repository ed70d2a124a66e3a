"""LLM.int8 against bitsandbytes, and against its own stated error."""

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import pytest
import torch
import torch.nn.functional as F

from ardor.errors import CheckpointError, ShapeError
from ardor.kernels.native import library
from ardor.quant import bnb8
from ardor.quant.bnb8 import RowsWeight, quantize_rows
from ardor.quant.packed import Rows

SHAPES = [(1, 1), (3, 5), (7, 64), (33, 129), (64, 512)]


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways to the same bytes."""
    if request.param == "compiled" and library() is None:
        pytest.skip("no C compiler on this machine")
    if request.param == "torch":
        monkeypatch.setattr(bnb8.native, "available", lambda weight: False)


def weight(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_bytes_are_those_of_bitsandbytes(shape, dtype):
    w = weight(shape, dtype)
    codes, largest, _ = functional.int8_vectorwise_quant(w.half())
    ours = quantize_rows(w)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.largest, largest)
    dense = functional.int8_vectorwise_dequant(codes, largest)
    torch.testing.assert_close(ours.dequantize(torch.float32), dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("path")
def test_rounding_to_float16_is_theirs_at_every_size(dtype):
    exponents = torch.arange(-30, 17).float()
    mantissas = 1 + torch.rand(2000, generator=torch.Generator().manual_seed(0))
    w = (2 ** exponents[:, None] * mantissas * (-1.0) ** torch.arange(2000)).to(dtype)
    w = w[w.abs().amax(1) < 65504]
    w[:, :3] = 0
    codes, largest, _ = functional.int8_vectorwise_quant(w.half())
    ours = quantize_rows(w)
    assert torch.equal(ours.largest, largest)
    assert torch.equal(ours.codes[largest > 0], codes[largest > 0])
    assert not ours.codes[largest == 0].any()


def theirs(w, bias, threshold):
    linear = bnb.nn.Linear8bitLt(
        w.shape[1], w.shape[0], has_fp16_weights=False, threshold=threshold
    )
    linear.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    linear.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return linear.to("cpu").eval()


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_product_is_that_of_bitsandbytes(outliers, rows):
    w, g = weight((48, 128)), torch.Generator().manual_seed(1)
    bias = torch.randn(48, generator=g)
    x = torch.randn(rows, 128, generator=g).half()  # theirs rounds to float16 first
    for i in range(outliers):
        x[i % rows, 10 * i] = 8.0 + i
    expected = theirs(w, bias.half(), 6.0)(x).float()
    ours = quantize_rows(w)
    # The 2e-5 by which their 1 / 127^2 is off, and the rounding of their float16 output.
    torch.testing.assert_close(ours.product(x.float(), bias), expected, rtol=2e-3, atol=2e-3)
    if outliers:  # the probe sees what is multiplied apart
        flat = RowsWeight(ours.codes, ours.largest, ours.original_dtype, threshold=0.0)
        assert not torch.allclose(flat.product(x.float(), bias), expected, rtol=2e-3, atol=2e-3)


def test_integers_and_floats_give_the_same_product(monkeypatch):
    w, x = quantize_rows(weight((48, 128))), torch.randn(9, 128)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(bnb8, "_fast_integers", lambda fast=fast: fast)
        found.append(w.product(x, None))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_outliers_keep_the_precision_of_the_rest():
    w, x = weight((48, 128)), torch.randn(4, 128)
    x[2, 5] = 300.0
    ours = quantize_rows(w)
    dense = F.linear(x, ours.dequantize(torch.float32))  # but for the rounding of x
    error = (ours.product(x, None) - dense).abs().max()
    flat = RowsWeight(ours.codes, ours.largest, ours.original_dtype, threshold=0.0)
    assert error < 0.3 * (flat.product(x, None) - dense).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_stays_within_the_stated_bound(dtype):
    w = torch.cat([weight((64, 256)), torch.linspace(-1, 1, 4096).view(16, 256)]).to(dtype)
    q = quantize_rows(w)
    error = (w.float() - q.dequantize(torch.float32)).abs()
    bound = q.error_bound()[:, None]
    assert (error <= bound).all()
    assert (error > 0.85 * bound).any()  # and it is not a loose one
    assert q.bytes == w.numel() + 4 * len(w)


def test_a_row_of_zeros_is_exact():
    w = weight((4, 80))
    w[1] = 0
    q = quantize_rows(w)
    assert not q.dequantize()[1].any()
    assert q.product(torch.zeros(2, 80), None).isfinite().all()


def test_no_rows_give_none_of_the_width_of_the_outputs():
    """A loss asks its head so, which checkpoints of bitsandbytes may hold in 8 bits too."""
    ours = quantize_rows(weight((5, 8)))
    assert ours.product(torch.zeros(2, 0, 8), None).shape == (2, 0, 5)


def test_parts_are_rows():
    q = quantize_rows(weight((24, 64)))
    dense = q.dequantize()
    assert torch.equal(q.rows(Rows(4, 8)).dequantize(), dense[4:12])
    interleaved = dense.view(4, 6, 64)[:, 2:5].flatten(0, 1)
    assert torch.equal(q.rows(Rows(2, 3, groups=4)).dequantize(), interleaved)


def test_files_are_those_of_bitsandbytes():
    w = weight((20, 76), torch.bfloat16)
    expected = theirs(w, torch.zeros(20), 6.0).state_dict()
    found = quantize_rows(w).tensors()
    assert {*found} == {*expected} - {"bias"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    back = RowsWeight.from_tensors(expected)
    assert torch.equal(back.codes, found["weight"])


def test_what_does_not_fit_is_refused():
    found = quantize_rows(weight((20, 76))).tensors()
    with pytest.raises(CheckpointError, match=r"up: found torch.int8 .* weight_format 2; expected"):
        RowsWeight.from_tensors(found | {"weight_format": torch.tensor(2)}, "up")
    with pytest.raises(CheckpointError, match=r"19 scales"):
        RowsWeight.from_tensors(found | {"SCB": torch.ones(19)}, "up")
    with pytest.raises(CheckpointError, match=r"not a complete LLM.int8 weight.*missing \['SCB'\]"):
        RowsWeight.from_tensors({"weight": found["weight"]}, "up")
    with pytest.raises(ShapeError, match="LLM.int8 holds matrices"):
        quantize_rows(torch.randn(4, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])  # 7e4 is infinite in float16
@pytest.mark.usefixtures("path")
def test_a_damaged_weight_is_refused(bad):
    w = weight((4, 70))
    w[3, 69] = bad
    with pytest.raises(CheckpointError, match=r"shape \(4, 70\) holds NaN or infinity"):
        quantize_rows(w)

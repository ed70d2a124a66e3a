"""NaN and infinity are found and counted, whatever the dtype."""

import pytest
import torch

from ardor.files.finite import not_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_is_counted(dtype):
    values = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not_finite(values) is None
    values[2, 699] = torch.nan
    assert not_finite(values) == "1 NaN of 2,100 values"
    values[0, :2] = -torch.inf
    assert not_finite(values) == "1 NaN and 2 infinite of 2,100 values"
    values[2, 699] = torch.finfo(dtype).max  # the largest is a number still
    assert not_finite(values.T) == "2 infinite of 2,100 values"


def test_a_sum_that_overflows_is_not_an_infinity():
    assert not_finite(torch.full((100,), 60_000.0, dtype=torch.float16)) is None


def test_what_has_no_nan_is_finite():
    assert not_finite(torch.tensor([255], dtype=torch.uint8)) is None
    assert not_finite(torch.empty(0)) is None
    assert not_finite(torch.zeros(()) / 0) == "1 NaN of 1 values"
    eight = torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)
    assert not_finite(eight) == "1 NaN of 2 values"

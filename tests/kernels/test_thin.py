import pytest
import torch

from ardor.kernels import thin
from ardor.kernels.native import library

pytestmark = pytest.mark.skipif(
    not hasattr(library(), "thin_dots"), reason="no compiler, or no products of bfloat16"
)
# Rows around the tiles of 6 and the blocks of 512, widths around those of 64.
SHAPES = [(8, 32, 8), (13, 96, 16), (512, 64, 8), (515, 160, 24), (1030, 128, 64)]


def case(rows: int, width: int, r: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(rows)
    sizes = (rows, width), (r, width), (rows, r)
    return tuple(torch.randn(*size, generator=g).bfloat16() for size in sizes)


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal to one rounding to bfloat16, or the order of float32 sums."""
    share = 2.0**-8 if found.dtype == torch.bfloat16 else 1e-5
    room = share * exact.abs() + 1e-5 * exact.abs().max()
    assert ((found.double() - exact).abs() <= room).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact_to_one_rounding(shape):
    x, a, low = case(*shape)
    wide, thin_side, short = x.double(), a.double(), low.double()
    assert_near(thin.dots(x, a, 0.5), 0.5 * wide @ thin_side.T)
    assert_near(thin.add(None, low, a, 0.5), 0.5 * short @ thin_side)
    assert_near(thin.add(x, low, a, 0.5), wide + 0.5 * short @ thin_side)
    assert_near(thin.outer(x, low, 0.5), 0.5 * short.T @ wide)
    with pytest.raises(AssertionError):  # the probe could have failed
        assert_near(thin.outer(x, low, 0.501), 0.5 * short.T @ wide)


def test_a_sum_is_written_where_it_is_wanted():
    x, a, low = case(20, 64, 8)
    apart, place = thin.add(x, low, a), x.clone()
    assert thin.add(place, low, a, out=place) is place
    assert torch.equal(place, apart) and not torch.equal(x, apart)


def test_a_row_does_not_depend_on_its_neighbours():
    x, a, low = case(31, 96, 16)
    found, added = thin.dots(x, a), thin.add(x, low, a)
    for start, end in ((0, 8), (5, 14), (20, 31)):
        assert torch.equal(thin.dots(x[start:end], a), found[start:end])
        assert torch.equal(thin.add(x[start:end], low[start:end], a), added[start:end])


def test_one_thread_and_several_give_the_same_bits():
    x, a, low = case(515, 160, 24)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((thin.dots(x, a), thin.add(x, low, a), thin.outer(x, low)))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_other_shapes_and_dtypes_are_not_taken(monkeypatch):
    x, *_ = case(8, 32, 8)
    assert thin.takes(x, 8)
    assert not thin.takes(x.float(), 8)
    assert not thin.takes(x[:7], 8)
    assert not thin.takes(x[:, :16], 8)
    assert not thin.takes(x, 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not thin.takes(x, 8)

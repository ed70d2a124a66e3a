import math

import pytest
import torch

from ardor.arch.positions import growth, rotate, rotation, turned
from ardor.arch.spec import ProportionalScaling, Rope, Temperature
from ardor.kernels.native import library

# What two roundings may differ by, for values of about 4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotated", [8, 4], ids=["whole", "partial"])
def test_the_fast_rotation_equals_the_reference_in_value_and_gradient(
    rotated, dtype, compiled, monkeypatch
):
    if compiled and library() is None:
        pytest.skip("no C compiler on this machine")
    if not compiled:
        monkeypatch.setattr("ardor.arch.positions.takes", lambda x, cos: False)
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]])
    by = rotation(Rope(theta=100.0, rotated=rotated), positions, dtype)
    # as attention makes it: a transposed view
    x = torch.randn(2, 5, 3, 8, generator=g).to(dtype).transpose(1, 2).requires_grad_()
    dense = torch.randn(2, 3, 5, 8, generator=g).to(dtype)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    for upstream in (dense, dense.transpose(1, 2).contiguous().transpose(1, 2), dense[:, :1]):
        found, expected = rotate(x, by), turned(x, by.cos, by.sin)
        torch.testing.assert_close(found, expected, **close)
        gradients = [
            torch.autograd.grad(out, x, upstream.expand_as(out))[0] for out in (found, expected)
        ]
        torch.testing.assert_close(*gradients, **close)
    assert (found - x).abs().max() > 0.3  # it turns at all
    with torch.no_grad():
        assert torch.equal(rotate(x, by), found)


def test_scores_depend_on_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, generator=g), torch.randn(1, 1, 1, 8, generator=g)
    rope = Rope(theta=100.0, rotated=8)

    def score(at: int, back: int) -> torch.Tensor:
        positions = [rotation(rope, torch.tensor([[n]]), torch.float32) for n in (at, at - back)]
        return (rotate(q, positions[0]) * rotate(k, positions[1])).sum()

    torch.testing.assert_close(score(3, 2), score(90, 2), rtol=1e-4, atol=1e-4)
    assert abs(score(3, 2) - score(3, 1)) > 1e-2


def test_queries_grow_in_steps_of_a_span():
    found = growth(Temperature(slope=0.5, span=4), torch.tensor([[0, 3, 4, 11]]))
    expected = [1.0, 1.0, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_pairs_that_are_no_part_of_the_proportion_stand_still():
    """The rest turn as in a head that turns whole, with its partner half a head away."""
    positions, g = torch.arange(5)[None], torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 5, 12, generator=g)
    whole = Rope(theta=50.0, rotated=12)
    part = Rope(theta=50.0, rotated=12, scaling=ProportionalScaling(turning=2))
    found, expected = (rotate(x, rotation(r, positions, torch.float32)) for r in (part, whole))
    turning = [0, 1, 6, 7]
    assert torch.equal(found[..., turning], expected[..., turning])
    still = [i for i in range(12) if i not in turning]
    assert torch.equal(found[..., still], x[..., still])
    assert not torch.equal(expected[..., still], x[..., still])

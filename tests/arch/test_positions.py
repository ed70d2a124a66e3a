import math

import pytest
import torch

from ardor.arch.positions import growth, rotate, rotation, turned
from ardor.arch.spec import Rope, Temperature


@pytest.mark.parametrize("rotated", [8, 4], ids=["whole", "partial"])
def test_the_fast_rotation_equals_the_reference_in_value_and_gradient(rotated):
    g = torch.Generator().manual_seed(0)
    by = rotation(Rope(theta=100.0, rotated=rotated), torch.arange(5)[None], torch.float32)
    # as attention makes it: a transposed view
    x = torch.randn(2, 5, 3, 8, generator=g).transpose(1, 2).requires_grad_()
    upstream = torch.randn(2, 3, 5, 8, generator=g)
    found, expected = rotate(x, by), turned(x, by.cos, by.sin)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert (found - x).abs().max() > 0.1  # it turns at all


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

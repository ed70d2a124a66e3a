"""Slopes and biases are those of transformers, for every number of heads."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from ardor.arch.blocked import Scores
from ardor.families.alibi import alibi_slopes, mpt_slopes

HEADS = (*range(1, 18), 71, 112)


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_of_the_paper(heads):
    theirs = _get_alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("most", [8.0, 16.0])
@pytest.mark.parametrize("heads", HEADS)
def test_slopes_of_mpt(heads, most):
    theirs = -build_mpt_alibi_tensor(heads, 2, alibi_bias_max=most)[:, 0, 0]
    torch.testing.assert_close(torch.tensor(mpt_slopes(heads, most)), theirs, rtol=1e-6, atol=0)


def test_coarse_biases_are_falcons_to_the_bit():
    """Over more positions than bfloat16 can count."""
    slopes, positions, scale = alibi_slopes(32), torch.arange(2048), 0.125
    theirs = build_alibi_tensor(torch.ones(1, 2048).long(), 32, torch.float32)[:, 0] * scale
    scores = Scores(scale, alibi=slopes, alibi_coarse=True)
    ours = scores.bias(torch.tensor(slopes)[:, None], positions - 2047, positions)
    assert torch.equal(ours, theirs)
    exact = scores._replace(alibi_coarse=False).bias(
        torch.tensor(slopes)[:, None] * scale, positions - 2047, positions
    )
    shift = (ours - exact)[:, :1]  # a constant for each head would not matter
    assert (ours - exact - shift).abs().max() > 0.2

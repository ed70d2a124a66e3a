"""Attention block by block equals the reference, in value and gradient, however it is cut."""

import pytest
import torch

from ardor.arch import blocked
from ardor.arch.attention import eager, sdpa
from ardor.arch.blocked import Scores
from ardor.arch.layout import Cached, Packed, Reach

H, K, d, e = 6, 3, 4, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64: only the order of sums differs

SCORES = {
    "window": Scores(0.7, Reach(window=3)),
    "chunk": Scores(0.7, Reach(chunk=4)),
    "window and chunk": Scores(0.7, Reach(window=3, chunk=5)),
    "softcap": Scores(0.7, softcap=1.5),
    "alibi": Scores(0.7, alibi=(0.5, 0.25, 0.1, 0.9, 0.0, 0.3)),
    "coarse alibi": Scores(0.7, alibi=(0.5, 0.25, 0.1, 0.9, 0.0, 0.3), alibi_coarse=True),
    "all": Scores(0.7, Reach(window=4), 2.0, (0.5, 0.25, 0.1, 0.9, 0.0, 0.3)),
    "plain": Scores(0.7),
}
LAYOUTS = {
    "whole": Packed.whole(2, 11),
    "documents": Packed(((11,), (3, 8))),
    "equal documents": Packed(((4, 4), (4, 4))),
    "many": Packed(((1, 2, 5), (5, 2, 1))),
    "cached": Cached((6, 6), 3),
    "uneven": Cached((2, 7), 4),
    "one": Cached((9, 3), 1),
}


def tensors(layout, dtype=torch.float64):
    rows = layout.positions(torch.device("cpu")).shape
    keys = layout.longest if isinstance(layout, Cached) else rows[1]
    g = torch.Generator().manual_seed(0)
    shapes = ((H, rows[1], d), (K, keys, d), (K, keys, e))
    # x2 keeps softmax far from uniform, where wrong scales and masks would hide
    made = [2 * torch.randn(rows[0], *shape, generator=g, dtype=dtype) for shape in shapes]
    return [*made, torch.randn(H, generator=g, dtype=dtype)]


@pytest.mark.parametrize("block", [1, 2, 128])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_blocks_equal_the_reference_in_value_and_gradient(
    scores, layout, sinks, block, monkeypatch
):
    monkeypatch.setattr(blocked, "BLOCK_QUERIES", block)
    made = [x.requires_grad_() for x in tensors(layout)]
    given = made if sinks else made[:3]
    extra = made[3] if sinks else None
    outs = [f(*made[:3], layout, scores, extra) for f in (sdpa, eager)]
    torch.testing.assert_close(*outs, **CLOSE)
    upstream = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = [torch.autograd.grad(out, given, upstream) for out in outs]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, **CLOSE)


@pytest.mark.parametrize("name", [n for n in SCORES if n != "plain"])
def test_each_feature_can_be_seen_by_that_comparison(name):
    layout = LAYOUTS["whole"]
    q, k, v, sinks = tensors(layout)
    plain = eager(q, k, v, layout, SCORES["plain"])
    assert (eager(q, k, v, layout, SCORES[name]) - plain).abs().max() > 0.1
    assert (eager(q, k, v, layout, SCORES["plain"], sinks) - plain).abs().max() > 0.1


def test_keys_out_of_every_window_are_never_multiplied(monkeypatch):
    seen = []
    real = blocked._scores

    def counted(q, k, block, scores):
        seen.append(
            (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
        )
        return real(q, k, block, scores)

    monkeypatch.setattr(blocked, "_scores", counted)
    monkeypatch.setattr(blocked, "BLOCK_QUERIES", 4)
    q, k, v, _ = tensors(Packed.whole(1, 32))
    sdpa(q, k, v, Packed.whole(1, 32), Scores(1.0, Reach(window=4)))
    assert sum(seen) <= 32 * (4 + 3)  # of 32 * 32 scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_whatever_comes_in(dtype):
    layout = LAYOUTS["documents"]
    q, k, v, sinks = (x.to(dtype) for x in tensors(layout))
    exact = eager(q.double(), k.double(), v.double(), layout, SCORES["all"], sinks.double())
    found = sdpa(q, k, v, layout, SCORES["all"], sinks)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0.03)

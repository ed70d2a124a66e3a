import pytest
import torch

from ardor.arch import attention
from ardor.arch.attention import eager, sdpa
from ardor.arch.blocked import Scores
from ardor.arch.layout import Cached, Reach
from ardor.kernels.attention import attend_last
from ardor.kernels.native import OFF, library

CASES = [  # query heads, kv heads, head width, positions held by each row
    (1, 1, 16, (0,)),
    (6, 3, 4, (2, 4)),
    (8, 1, 64, (32,)),  # all heads share one
    (6, 6, 24, (16, 0)),  # none share
    (32, 4, 80, (99, 6, 15)),
    (7, 7, 33, (299, 300)),
]
# Of the largest value: the rounding of the result, and the float32 sums' own error.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")


def case(heads: int, kv_heads: int, width: int, past: tuple[int, ...], dtype: torch.dtype):
    """q, k, v as decoding has them: k and v are the filled part of a larger cache."""
    g = torch.Generator().manual_seed(0)
    rows, filled = len(past), max(past) + 1
    # x3 keeps softmax far from uniform; what a row may not read is poison
    q = (3 * torch.randn(rows, 1, heads, width, generator=g)).to(dtype).transpose(1, 2)
    cache = torch.randn(2, rows, kv_heads, filled + 5, width, generator=g).to(dtype)
    for row, held in enumerate(past):
        cache[:, row, :, held + 1 :] = 1e9
    return q, *cache[:, :, :, :filled], Cached(past, 1)


@needs_compiler
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("heads, kv_heads, width, past", CASES)
def test_the_last_position_equals_the_reference(heads, kv_heads, width, past, dtype, monkeypatch):
    q, k, v, layout = case(heads, kv_heads, width, past, dtype)
    taken = []
    monkeypatch.setattr(
        attention, "attend_last", lambda *a, **o: taken.append(1) or attend_last(*a, **o)
    )
    with torch.no_grad():
        found = sdpa(q, k, v, layout, Scores(0.3))
    exact = eager(q.double(), k.double(), v.double(), layout, Scores(0.3))
    assert found.dtype == dtype and found.shape == q.shape
    assert taken == [1] * (max(past) > 0)  # the first position of all is plain causal attention
    size = v.double().abs()[v.abs() < 1e9].max()
    assert (found.double() - exact).abs().max() <= RELATIVE[dtype] * size
    uniform = eager(q.double(), k.double(), v.double(), layout, Scores(0.0))
    assert max(past) == 0 or (uniform - exact).abs().max() > 0.1  # the probe could have failed


SLOPES = (0.5, 0.03, 0.25, 0.0, 0.1, 0.02)
HOWS = {
    "window": Scores(0.3, Reach(window=20)),
    "window of one": Scores(0.3, Reach(window=1)),
    "chunk": Scores(0.3, Reach(chunk=16)),
    "softcap": Scores(0.3, softcap=1.5),
    "high softcap": Scores(0.3, softcap=50.0),
    "alibi": Scores(0.3, alibi=SLOPES),
    "all": Scores(0.3, Reach(window=25), 2.0, SLOPES),
    "plain": Scores(0.3),
}


@needs_compiler
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", HOWS)
def test_what_fused_kernels_lack_is_in_it(name, sinks, dtype, monkeypatch):
    monkeypatch.setattr(attention, "attend_blocked", None)  # would be a TypeError
    q, k, v, layout = case(6, 3, 24, (40, 7, 16), dtype)
    sink = torch.tensor([1.0, 3.0, -2.0, 0.5, 2.0, 4.0]) if sinks else None
    with torch.no_grad():
        found = sdpa(q, k, v, layout, HOWS[name], sink)
    exact = eager(q.double(), k.double(), v.double(), layout, HOWS[name], sink)
    size = v.double().abs()[v.abs() < 1e9].max()
    assert (found.double() - exact).abs().max() <= RELATIVE[dtype] * size
    plain = eager(q.double(), k.double(), v.double(), layout, HOWS["plain"])
    if sinks or name not in ("plain", "high softcap"):  # the probe could have failed
        assert (plain - exact).abs().max() > 0.1
    elif name == "high softcap":
        assert (plain - exact).abs().max() > 10 * RELATIVE[torch.float32]


@needs_compiler
def test_large_scores_do_not_overflow():
    q, k, v, layout = case(4, 2, 16, (20, 9), torch.float32)
    with torch.no_grad():
        found = attend_last(1e4 * q, k, v, [(0, 21), (0, 10)], scale=1.0)
    torch.testing.assert_close(found, eager(1e4 * q, k, v, layout, Scores(1.0)))


@needs_compiler
def test_it_takes_one_position_without_gradients_and_leaves_the_rest(monkeypatch):
    taken = []
    monkeypatch.setattr(
        attention, "attend_last", lambda *a, **o: taken.append(1) or attend_last(*a, **o)
    )
    q, k, v, layout = case(4, 2, 16, (3, 5), torch.float32)
    with torch.no_grad():
        sdpa(q, k, v, layout, Scores(1.0))
        assert taken == [1]
        sdpa(q.double(), k.double(), v.double(), layout, Scores(1.0))
        sdpa(q, k, v.contiguous(), layout, Scores(1.0))  # not two slices of one cache
        sdpa(q.expand(-1, -1, 2, -1), k, v, Cached((2, 4), 2), Scores(1.0))
    sdpa(q.requires_grad_(), k, v, layout, Scores(1.0)).sum().backward()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        sdpa(q, k, v, layout, Scores(1.0))
    assert taken == [1] and q.grad is not None


def test_without_a_compiler_the_torch_path_remains(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv(OFF, "1")
    try:
        q, k, v, layout = case(4, 2, 16, (3, 5), torch.float32)
        with torch.no_grad():
            found = sdpa(q, k, v, layout, Scores(1.0))
        assert library() is None
        torch.testing.assert_close(found, eager(q, k, v, layout, Scores(1.0)))
    finally:
        monkeypatch.undo()
        library.cache_clear()

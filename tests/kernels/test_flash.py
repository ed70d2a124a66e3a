import pytest
import torch

from ardor.arch import attention
from ardor.arch.attention import eager, sdpa
from ardor.arch.blocked import Scores
from ardor.arch.layout import Packed, Reach
from ardor.kernels.flash import How, flash, takes
from ardor.kernels.native import library

CASES = [  # rows, positions, query heads, kv heads, head width
    (1, 1, 2, 2, 64),
    (2, 17, 4, 2, 64),
    (3, 64, 3, 3, 64),
    (1, 65, 4, 1, 128),
    (2, 200, 6, 2, 64),
    (2, 70, 4, 2, 6),  # heads that do not fill their tiles
    (1, 129, 2, 1, 80),
]
SLOPES = (0.5, 0.03, 0.25, 0.0, 0.1, 0.02)
HOWS = {
    "window": Scores(0.2, Reach(window=20)),
    "wide window": Scores(0.2, Reach(window=150)),
    "window of one": Scores(0.2, Reach(window=1)),
    "chunk": Scores(0.2, Reach(chunk=50)),
    "window and chunk": Scores(0.2, Reach(window=70, chunk=96)),
    "softcap": Scores(0.2, softcap=1.5),
    "alibi": Scores(0.2, alibi=SLOPES),
    "all": Scores(0.2, Reach(window=90), 2.0, SLOPES),
    "plain": Scores(0.2),
}
# Of a tensor's norm. Weights, their slopes and every result are rounded to 8 bits, 2^-9 each at
# most and less on average; a gradient passes through three of these roundings.
RELATIVE = 2.0**-7

needs_flash = pytest.mark.skipif(
    not hasattr(library(), "flash_forward"), reason="not compiled on this machine"
)


def case(rows: int, positions: int, heads: int, kv_heads: int, width: int) -> list[torch.Tensor]:
    """q, k, v and what arrives from above: transposed views, as attention has them."""
    g = torch.Generator().manual_seed(positions)
    return [
        torch.randn(rows, positions, n, width, generator=g).bfloat16().transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def with_gradients(function, q, k, v, upstream) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@needs_flash
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_flash_equals_the_reference_in_value_and_gradients(shape):
    inputs = case(*shape)
    layout = Packed.whole(*shape[:2])
    found = with_gradients(lambda q, k, v: flash(q, k, v, How(0.2)), *inputs)
    exact = with_gradients(
        lambda q, k, v: eager(q, k, v, layout, Scores(0.2)), *(x.double() for x in inputs)
    )
    for mine, reference in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == reference.shape
        # At one position the gradients of q and k vanish, up to the rounding of what cancels.
        size = max(reference.norm(), 0.1)
        assert (mine.double() - reference).norm() <= RELATIVE * size
    if shape[1] > 1:
        wrong = eager(*(x.double() for x in inputs[:3]), layout, Scores(0.25))
        assert (wrong - exact[0]).norm() > 4 * RELATIVE * exact[0].norm()


@needs_flash
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", HOWS)
def test_what_fused_kernels_lack_is_in_it(name, sinks, monkeypatch):
    monkeypatch.setattr(attention, "attend_blocked", None)  # would be a TypeError
    layout, inputs = Packed.whole(2, 200), case(2, 200, 6, 2, 64)
    sink = torch.tensor([1.0, 3.0, -2.0, 0.5, 2.0, 4.0]).requires_grad_() if sinks else None
    extra = [sink] if sinks else []

    def results(backend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
        out = backend(*leaves, layout, HOWS[name], *extra)
        return [out, *torch.autograd.grad(out, [*leaves, *extra], inputs[3].to(dtype))]

    found, exact = results(sdpa, torch.bfloat16), results(eager, torch.float64)
    for mine, reference in zip(found, exact, strict=True):
        assert mine.shape == reference.shape
        # Where each reads itself alone, the gradients of q and k vanish but for what cancels.
        size = max(reference.norm(), 1.0)
        assert (mine.double() - reference).norm() <= RELATIVE * size
    if sinks or name != "plain":  # the probe could have failed
        plain = eager(*(x.double() for x in inputs[:3]), layout, HOWS["plain"])
        assert (plain - exact[0]).norm() > 4 * RELATIVE * exact[0].norm()


@needs_flash
def test_documents_of_any_length_equal_the_reference(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "flash", lambda *a, **o: taken.append(1) or flash(*a, **o))
    layout = Packed(((70, 70, 20), (33, 127)))
    inputs = case(2, 160, 4, 2, 64)
    found = with_gradients(lambda q, k, v: sdpa(q, k, v, layout, Scores(0.2)), *inputs)
    exact = with_gradients(
        lambda q, k, v: eager(q, k, v, layout, Scores(0.2)), *(x.double() for x in inputs)
    )
    assert len(taken) == 3  # not the document of 20
    for mine, reference in zip(found, exact, strict=True):
        assert (mine.double() - reference).norm() <= RELATIVE * reference.norm()


@needs_flash
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_the_future_cannot_leak(cut):
    q, k, v, upstream = case(1, 130, 2, 1, 64)
    upstream[:, :, cut:] = 0
    first = with_gradients(lambda *a: flash(*a, How(0.2)), q, k, v, upstream)
    k, v = k.clone(), v.clone()
    k[:, :, cut:], v[:, :, cut:] = 100, 1e4
    second = with_gradients(lambda *a: flash(*a, How(0.2)), q, k, v, upstream)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[:, :, :cut], other[:, :, :cut])
    assert not torch.equal(first[0][:, :, cut:], second[0][:, :, cut:])
    assert not any(x[:, :, cut:].any() for x in second[1:])


@needs_flash
def test_large_scores_do_not_overflow():
    q, k, v, upstream = case(1, 100, 2, 2, 64)
    found = with_gradients(lambda *a: flash(*a, How(1.0)), 1e3 * q, k, v, upstream)
    exact = eager(1e3 * q.double(), k.double(), v.double(), Packed.whole(1, 100), Scores(1.0))
    assert all(x.isfinite().all() for x in found)
    assert (found[0].double() - exact).norm() <= RELATIVE * exact.norm()


@needs_flash
def test_it_takes_bfloat16_heads_of_its_widths_and_leaves_the_rest(monkeypatch):
    q, k, v, _ = case(2, 40, 4, 2, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert takes(q, k, v)
    assert not takes(q.float(), k.float(), v.float())
    assert takes(q[..., :6], k[..., :6], v[..., :6])
    assert not takes(q[..., :7], k[..., :7], v[..., :7])  # pairs of channels are multiplied
    assert not takes(q, k, v[..., :48])
    assert not takes(q[:, :, :31], k[:, :, :31], v[:, :, :31])
    assert not takes(q[:1], k[:1, :1], v[:1, :1])  # work for one of the eight threads
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes(q, k, v)

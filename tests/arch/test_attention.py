import pytest
import torch
import torch.nn.functional as F

from ardor.arch.attention import attend, eager, sdpa
from ardor.arch.blocked import Scores
from ardor.arch.layout import Cached, Packed
from ardor.errors import ShapeError

B, T, H, K, d = 2, 5, 6, 3, 4
causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()


def qkv(rows: int = B, new: int = T, total: int = T) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    # x3 keeps softmax far from uniform, where wrong scales and masks would hide
    return [
        3 * torch.randn(rows, heads, positions, d, generator=g)
        for heads, positions in ((H, new), (K, total), (K, total))
    ]


def test_agrees_with_torch():
    q, k, v = qkv()
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, causal, scale=d**-0.5), theirs)


def test_row_with_nothing_allowed_is_zero_with_finite_gradient():
    q, k, v = qkv()
    q.requires_grad_()
    out = attend(q, k, v, torch.zeros_like(causal), scale=1.0)
    out.sum().backward()
    assert not out.any() and q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize(
    "layout",
    [
        Packed.whole(2, 6),
        Packed(((6,), (2, 4))),
        Packed(((3, 3), (3, 3))),
        Packed(((1, 5), (5, 1))),
    ],
)
def test_sdpa_equals_the_reference_on_documents(layout):
    q, k, v = qkv(2, 6, 6)
    torch.testing.assert_close(
        sdpa(q, k, v, layout, Scores(0.7)),
        eager(q, k, v, layout, Scores(0.7)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("past, new", [((4, 4), 1), ((3, 5), 1), ((3, 5), 3), ((4, 4), 3)])
def test_sdpa_equals_the_reference_on_a_cache(past, new):
    layout = Cached(past, new)
    q, k, v = qkv(2, new, layout.longest)
    torch.testing.assert_close(
        sdpa(q, k, v, layout, Scores(0.7)),
        eager(q, k, v, layout, Scores(0.7)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    "layout", [Packed(((300,), (100, 200))), Cached((280, 297), 3), Cached((0, 0), 300)]
)
def test_blocks_have_the_alibi_of_the_reference(layout, coarse):
    q, k, v = qkv(2, 3 if isinstance(layout, Cached) and layout.past[0] else 300, 300)
    scores = Scores(0.7, alibi=(0.7, 0.1, 0.03, 0.3, 0.01, 0.9), alibi_coarse=coarse)
    ours = sdpa(q, k, v, layout, scores)
    torch.testing.assert_close(ours, eager(q, k, v, layout, scores), rtol=1e-5, atol=1e-5)
    other = eager(q, k, v, layout, scores._replace(alibi_coarse=not coarse))
    assert (ours - other).abs().max() > 0.1


def test_masked_out_document_blocks_are_never_computed(monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def counted(q, k, *rest, **options):
        seen.append(q.shape[0] * q.shape[2] * k.shape[2])
        return real(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = qkv(1, 12, 12)
    sdpa(q, k, v, Packed(((2, 2, 8),)), Scores(1.0))
    assert sum(seen) == 2 * 2 + 2 * 2 + 8 * 8  # of 12 * 12 scores


@pytest.mark.parametrize("backend", [eager, sdpa])
def test_heads_that_do_not_divide_are_refused(backend):
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="5 query heads cannot share 3 kv heads"):
        backend(q[:, :5], k, v, Packed.whole(B, T), Scores(1.0))

import pytest
import torch
import torch.nn.functional as F

from ardor import loss
from ardor.kernels import entropy
from ardor.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 2), (3, 50), (5, 511), (4, 1025), (40, 3000)]


def case(rows: int, vocab: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(rows)
    logits = (5 * torch.randn(rows, vocab, generator=g)).to(dtype)
    factors = torch.randn(rows, generator=g)
    return logits, torch.randint(0, vocab, (rows,), generator=g), factors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows, vocab", SIZES)
def test_nats_and_slope_equal_those_of_float64(rows, vocab, weighted, dtype):
    logits, targets, factors = case(rows, vocab, dtype)
    exact = logits.double().requires_grad_()
    nats = F.cross_entropy(exact, targets, reduction="none")
    factor = factors if weighted else torch.ones(rows)
    (wanted,) = torch.autograd.grad((nats * factor).sum(), [exact])
    slope = torch.empty_like(logits)
    found = entropy.cross_entropy(logits, targets, slope, factors if weighted else None)
    torch.testing.assert_close(found.double(), nats.detach(), rtol=1e-6, atol=1e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(slope.double(), wanted, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_what_torch_does_in_its_place(dtype, monkeypatch):
    logits, targets, factors = case(7, 600, dtype)
    slopes = [torch.full_like(logits, 9.0) for _ in range(2)]
    nats = [loss.token_nats(logits, targets, slopes[0], factors)]
    monkeypatch.setattr(entropy, "takes", lambda logits: False)
    nats.append(loss.token_nats(logits, targets, slopes[1], factors))
    torch.testing.assert_close(*nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_only_the_columns_it_is_given_are_read_and_written():
    logits, targets, _ = case(6, 90, torch.float32)
    wide, slope = torch.full((6, 100), 1e9), torch.full((6, 120), 7.0)
    wide[:, :90] = logits
    found = entropy.cross_entropy(wide[:, :90], targets, slope[:, :90])
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, reduction="none"))
    assert (slope[:, 90:] == 7.0).all() and slope[:, :90].sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_none_and_what_cannot_be_counts_nothing(dtype):
    logits, targets, _ = case(4, 40, dtype)
    targets = torch.tensor([1, 1, 1, 39])
    logits[0, 30] = torch.nan
    logits[1, 30] = torch.inf
    logits[2, 20:] = -torch.inf
    logits[3, 39] = -torch.inf
    slope = torch.empty_like(logits)
    nats = entropy.cross_entropy(logits, targets, slope)
    wanted = F.cross_entropy(logits.float(), targets, reduction="none")
    assert nats[:2].isnan().all() and wanted[:2].isnan().all()
    torch.testing.assert_close(nats[2:], wanted[2:], rtol=1e-5, atol=1e-5)
    assert (slope[2, 20:] == 0).all()


def test_precision_does_not_fall_with_the_size_of_the_vocabulary():
    vocab = 300_000
    logits = torch.zeros(1, vocab)  # every term of the sum rounds the same way, if it rounds
    nats = entropy.cross_entropy(logits, torch.tensor([5]))
    assert float(nats) == pytest.approx(float(torch.tensor(float(vocab)).double().log()), rel=1e-7)

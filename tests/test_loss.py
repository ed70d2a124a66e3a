import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ardor import loss
from ardor.arch.linear import LinearHead
from ardor.loss import (
    IGNORE,
    chunked_next_token_loss,
    chunked_token_logprobs,
    next_token_loss,
)

from .memory.live import live_peak

B, T, D, V = 3, 7, 8, 50


def case(dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[0, :4] = targets[2, -1] = IGNORE
    return hidden, weight, targets


def test_it_is_the_masked_sum_of_the_literature():
    hidden, weight, targets = (x.detach() for x in case())
    logits = hidden @ weight.T
    by_hand = 0.0
    for b in range(B):
        for t in range(T):
            if targets[b, t] != IGNORE:
                p = logits[b, t].float().softmax(-1)[targets[b, t]]
                by_hand -= float(p.log())
    found = next_token_loss(logits, targets)
    assert float(found.nats) == pytest.approx(by_hand, rel=1e-5)
    assert int(found.targets) == B * T - 5


def test_loss_of_a_batch_equals_its_unequal_microbatches():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 7, generator=g)
    targets = torch.randint(0, 7, (4, 3), generator=g)
    targets[0, :2] = IGNORE  # the halves now hold 4 and 6 targets
    whole = next_token_loss(logits, targets)
    parts = [next_token_loss(logits[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    assert [int(p.targets) for p in parts] == [4, 6]
    torch.testing.assert_close(sum(p.nats for p in parts), whole.nats)
    mean_of_means = torch.stack([p.nats / p.targets for p in parts]).mean()
    assert not torch.isclose(mean_of_means, whole.nats / whole.targets)  # the usual mistake


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
def test_chunked_equals_whole_in_value_and_gradient(chunk):
    hidden, weight, targets = case(torch.float32)
    whole = next_token_loss(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(whole.nats / 3, [hidden, weight])
    mine = chunked_next_token_loss(hidden, targets, lambda h, w: h @ w.T, (weight,), chunk=chunk)
    assert int(mine.targets) == int(whole.targets)
    torch.testing.assert_close(mine.nats, whole.nats)
    for a, b in zip(torch.autograd.grad(mine.nats / 3, [hidden, weight]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", [lambda h, w: h @ w.T, LinearHead()])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("chunk", [3, None])
def test_ids_without_a_token_have_no_probability_and_no_gradient(
    chunk, compiled, head, monkeypatch
):
    if not compiled:
        monkeypatch.setattr("ardor.kernels.entropy.takes", lambda logits: False)
    hidden, weight, targets = case(torch.float32)
    known = V - 7
    targets = targets.clamp(max=known - 1)
    whole = next_token_loss((hidden @ weight.T)[..., :known], targets)
    wanted = torch.autograd.grad(whole.nats, [hidden, weight])
    mine = chunked_next_token_loss(hidden, targets, head, (weight,), known=known, chunk=chunk)
    torch.testing.assert_close(mine.nats, whole.nats)
    found = torch.autograd.grad(mine.nats, [hidden, weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not found[1][known:].any()


def test_chunked_trains_the_states_under_a_frozen_head():
    hidden, weight, targets = case(torch.float32)
    frozen = weight.detach()
    whole = next_token_loss(hidden @ frozen.T, targets)
    mine = chunked_next_token_loss(hidden, targets, lambda h, w: h @ w.T, (frozen,), chunk=4)
    (a,), (b,) = (torch.autograd.grad(found.nats, [hidden]) for found in (mine, whole))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("finish", [None, lambda logits: 3 * torch.tanh(logits / 3)])
@pytest.mark.parametrize("tile", [1, 1 << 20])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_head_has_its_gradient_in_pieces(biased, tile, finish, monkeypatch):
    monkeypatch.setattr(loss, "TILE_BYTES", tile)
    hidden, weight, targets = case(torch.float32)
    bias = torch.linspace(-1, 1, V).requires_grad_()
    parameters = (weight, bias) if biased else (weight,)
    head = LinearHead(finish)
    whole = next_token_loss(head(hidden, *parameters), targets)
    mine = chunked_next_token_loss(hidden, targets, head, parameters, chunk=4)
    torch.testing.assert_close(mine.nats, whole.nats)
    leaves = [hidden, *parameters]
    wanted = torch.autograd.grad(whole.nats / 3, leaves)
    for a, b in zip(torch.autograd.grad(mine.nats / 3, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_it_is_differentiated_once():
    hidden, weight, targets = case(torch.float32)
    nats = chunked_next_token_loss(hidden, targets, LinearHead(), (weight,)).nats
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        nats.backward()


def test_chunked_measures_where_no_gradient_is_wanted():
    hidden, weight, targets = case(torch.float32)
    with torch.inference_mode():
        whole = next_token_loss(hidden @ weight.T, targets)
        mine = chunked_next_token_loss(hidden, targets, lambda h, w: h @ w.T, (weight,), chunk=4)
    torch.testing.assert_close(mine.nats, whole.nats)
    assert not mine.nats.requires_grad


def test_nothing_to_learn_is_zero_with_zero_gradient():
    hidden, weight, targets = case(torch.float32)
    found = chunked_next_token_loss(
        hidden, torch.full_like(targets, IGNORE), lambda h, w: h @ w.T, (weight,)
    )
    found.nats.backward()
    assert float(found.nats.detach()) == 0 and int(found.targets) == 0
    assert weight.grad is not None and not weight.grad.any()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes, and keeps them all."""

    def __init__(self):
        super().__init__()
        self.elements, self.made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                self.made.append(tensor)
        return out


def test_tokens_by_vocabulary_are_never_held_in_either_direction():
    g = torch.Generator().manual_seed(0)
    tokens, vocab = 640, 96
    hidden = torch.randn(1, tokens, D, generator=g).requires_grad_()
    weight = torch.randn(vocab, D, generator=g).requires_grad_()
    targets = torch.randint(0, vocab, (1, tokens), generator=g)
    with Largest() as chunked:
        chunked_next_token_loss(hidden, targets, F.linear, (weight,), chunk=32).nats.backward()
    with Largest() as whole:
        next_token_loss(F.linear(hidden, weight), targets).nats.backward()
    assert chunked.elements <= max(32 * vocab, tokens * D)
    assert whole.elements >= tokens * vocab  # the probe sees what it looks for


def test_an_oracle_that_knows_the_next_token_has_no_loss():
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    targets = torch.tensor([[1, 4, 1, 5, IGNORE]])
    oracle = 50.0 * F.one_hot(targets.clamp(min=0), 9).float()
    assert float(next_token_loss(oracle, targets).nats) < 1e-6
    assert float(next_token_loss(oracle, tokens).nats) > 10  # shifted wrongly it is not


def test_slopes_of_a_plain_head_are_written_over_its_logits_and_all_pieces_share_them():
    g = torch.Generator().manual_seed(0)
    tokens, vocab = 300, 512
    hidden = torch.randn(1, tokens, D, generator=g).requires_grad_()
    weight = torch.randn(vocab, D, generator=g).requires_grad_()
    targets = torch.randint(0, vocab, (1, tokens), generator=g)

    def blocks(head) -> int:
        with Largest() as seen:
            chunked_next_token_loss(hidden, targets, head, (weight,), chunk=104).nats.backward()
        storages = (tensor.untyped_storage() for tensor in seen.made)
        return len({s.data_ptr() for s in storages if s.nbytes() == 4 * 104 * vocab})

    assert blocks(LinearHead()) == 1
    assert blocks(F.linear) > 1  # the probe sees what it looks for


def test_products_of_the_head_have_few_sizes():
    assert {loss._filled(n) for n in range(1025, 2049)} == set(range(1088, 2049, 64))
    assert all(n <= loss._filled(n) < n * 17 / 16 + loss.ROWS for n in range(1, 5000))


# --- several micro-batches ---


def of_three_batches(weight, loss_of, *, dtype=torch.float32, table=False):
    """The gradient after three micro-batches of one step, which divides by all of their targets."""
    g = torch.Generator().manual_seed(1)
    count = 13
    for tokens in (7, 1, 5):
        targets = torch.randint(0, V, (1, tokens), generator=g)
        hidden = torch.randn(1, tokens, D, generator=g).to(dtype)
        if table:  # a tied one: what is looked up in it has a gradient too
            hidden = hidden + F.embedding(targets.flip(1), weight)
        (loss_of(hidden, targets, weight) / count).backward()
    return weight.grad


def whole(hidden, targets, weight):
    return next_token_loss(hidden @ weight.T, targets).nats


def separately(hidden, targets, weight):
    return chunked_next_token_loss(hidden, targets, LinearHead(), (weight,), chunk=2).nats


def together(hidden, targets, weight):
    return chunked_next_token_loss(
        hidden, targets, LinearHead(), (weight,), chunk=2, share=1 / 13
    ).nats


def together_weighed(hidden, targets, weight):
    return -chunked_token_logprobs(
        hidden, targets, LinearHead(), (weight,), chunk=2, accumulate=True
    ).sum()


@pytest.mark.parametrize("head", [LinearHead(), lambda h, w: 2 * (h @ w.T)])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_that_are_summed_where_they_are_kept_are_those_of_the_reference(
    weighed, table, head
):
    def mine(hidden, targets, weight):
        parts = hidden, targets, head, (weight,)
        if weighed:
            return -chunked_token_logprobs(*parts, chunk=2, accumulate=True).sum()
        return chunked_next_token_loss(*parts, chunk=2, share=1 / 13).nats

    _, weight, _ = case(torch.float32)
    other = weight.detach().clone().requires_grad_()
    found = of_three_batches(weight, mine, table=table)
    wanted = of_three_batches(
        other, lambda h, t, w: next_token_loss(head(h, w), t).nats, table=table
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_of", "held"), [(separately, 2), (together, 1), (together_weighed, 1)]
)
def test_the_gradient_of_a_head_is_held_once_over_micro_batches(loss_of, held, monkeypatch):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 64, generator=g).requires_grad_()
    monkeypatch.setattr(loss, "TILE_BYTES", weight.nbytes // 50)
    weight.grad = torch.zeros_like(weight)
    hidden, targets = torch.randn(1, 8, 64, generator=g), torch.arange(8)[None]
    place = weight.grad.data_ptr()

    def micro_batch() -> None:
        (loss_of(hidden, targets, weight) / 13).backward()

    # Beside what earlier ones have left; the logits of eight rows are an eighth of it.
    assert held - 1 <= live_peak(micro_batch) / weight.nbytes < held - 0.7
    assert weight.grad.data_ptr() == place


@pytest.mark.parametrize("loss_of", [separately, together, together_weighed])
def test_hooks_see_the_whole_gradient_of_every_micro_batch(loss_of):
    _, weight, _ = case(torch.float32)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    found = of_three_batches(weight, loss_of)
    assert len(seen) == 3 and torch.equal(seen[-1], found)
    assert seen[0].abs().sum() > 0 and not torch.equal(seen[0], seen[1])


def test_small_gradients_in_16_bits_are_not_lost_beside_the_large_sum_before_them():
    weight = torch.zeros(V, D, dtype=torch.bfloat16).requires_grad_()
    weight.grad = torch.full_like(weight, 64.0)
    hidden = torch.ones(1, 400, D, dtype=torch.bfloat16)
    targets = torch.zeros(1, 400, dtype=torch.int64)
    nats = chunked_next_token_loss(
        hidden, targets, LinearHead(), (weight,), chunk=1, share=1 / 400
    ).nats
    (nats / 400).backward()
    # 400 additions of less than half of what follows 64 in bfloat16, 0.5; together they are 0.98.
    assert bool((weight.grad[0] <= 63.25).all())


def test_measuring_takes_no_gradient_away():
    hidden, weight, targets = case(torch.float32)
    weight.grad = kept = torch.ones_like(weight)
    with torch.no_grad():
        chunked_next_token_loss(hidden, targets, LinearHead(), (weight,), share=0.1)
    assert weight.grad is kept and bool((kept == 1).all())


def test_another_share_than_was_said_is_refused():
    hidden, weight, targets = case(torch.float32)
    nats = chunked_next_token_loss(hidden, targets, LinearHead(), (weight,), share=0.1).nats
    with pytest.raises(RuntimeError, match=r"times 0\.5, and share=0\.1"):
        (nats / 2).backward()

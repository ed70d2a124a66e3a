"""Where weights are expanded for the moment of a product."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ardor.quant.bnb4 import quantize_4bit


def test_products_share_the_room_that_their_weights_are_expanded_in():
    torch.manual_seed(0)
    first, second = (quantize_4bit(torch.randn(64, 128).bfloat16(), "nf4") for _ in range(2))
    own = [weight.dequantize(torch.bfloat16) for weight in (first, second)]
    assert first.expanded(torch.bfloat16).data_ptr() == second.expanded(torch.bfloat16).data_ptr()
    assert torch.equal(first.expanded(torch.bfloat16), own[0])
    assert torch.equal(second.expanded(torch.float32), second.dequantize(torch.float32))
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    results = [weight.product(x, None) for weight in (first, second)]
    assert all(torch.equal(y, x @ w.T) for y, w in zip(results, own, strict=True))
    (slope,) = torch.autograd.grad(sum(y.sum() for y in results), x)
    expected = sum(torch.ones(3, 64).bfloat16() @ w for w in own)
    torch.testing.assert_close(slope, expected)
    smaller = quantize_4bit(torch.randn(8, 64), "nf4")  # a part of the room, and then all again
    assert torch.equal(smaller.expanded(torch.float32), smaller.dequantize(torch.float32))
    assert torch.equal(first.expanded(torch.bfloat16), own[0])


def test_each_thread_expands_in_room_of_its_own():
    weight = quantize_4bit(torch.randn(64, 128), "nf4")
    mine = weight.expanded(torch.float32)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(weight.expanded, torch.float32).result()
    assert mine.data_ptr() != theirs.data_ptr() and torch.equal(mine, theirs)

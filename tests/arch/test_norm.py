import pytest
import torch

from ardor.arch.norm import RMSNorm, rms_norm
from ardor.arch.spec import Norm
from ardor.kernels.native import library

# What two roundings to bfloat16 (8 bits) may differ by, for values of about 1 and their gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("kind", ["scale", "one_plus"])
def test_the_fast_norm_equals_the_reference_in_value_and_gradient(
    kind, late, dtype, compiled, monkeypatch
):
    if compiled and library() is None:
        pytest.skip("no C compiler on this machine")
    if not compiled:
        monkeypatch.setattr("ardor.arch.norm.available", lambda x: False)
    g = torch.Generator().manual_seed(0)
    module = RMSNorm(24, Norm(eps=1e-3, weight=kind, late_cast=late))
    module.weight.data.normal_(generator=g)
    x = torch.randn(2, 5, 24, generator=g).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, 24, generator=g).to(dtype)
    weight = module.weight + (kind == "one_plus")
    outs = [module(x), rms_norm(x, weight, 1e-3, late)]
    gradients = [torch.autograd.grad(out, [x, module.weight], upstream) for out in outs]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=TOLERANCE[dtype])
    for mine, reference in zip(*gradients, strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, **close)
    wrong = rms_norm(x, weight, 1e-1, late)  # the probe could have failed
    assert (wrong - outs[1]).abs().max() > 2 * TOLERANCE[dtype]


def test_a_frozen_weight_gets_no_gradient_but_the_input_does():
    module = RMSNorm(8, Norm(eps=1e-6)).requires_grad_(False)
    module.weight.fill_(2.0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module(x).square().sum().backward()
    assert module.weight.grad is None and x.grad is not None and x.grad.abs().max() > 0


def test_a_late_cast_keeps_what_the_early_one_rounds_away():
    x = torch.linspace(-2, 3, 64).bfloat16()[None]
    weight = torch.full((64,), 0.3)
    early, late = (rms_norm(x, weight, 1e-6, late) for late in (False, True))
    assert not torch.equal(early, late)
    for kind, expected in ((False, early), (True, late)):
        module = RMSNorm(64, Norm(eps=1e-6, late_cast=kind))
        module.weight.data.copy_(weight)
        with torch.no_grad():
            assert (module(x) != expected).float().mean() < 0.1  # sums in another order

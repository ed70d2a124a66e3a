"""The compiled products of adapters against the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from ardor.adapters.initial import Start
from ardor.adapters.lora import LoraExperts, LoraLinear
from ardor.adapters.lowrank import added
from ardor.arch.linear import Linear
from ardor.kernels import thin
from ardor.kernels.native import library
from ardor.quant.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(
    not hasattr(library(), "thin_dots"), reason="no compiler, or no products of bfloat16"
)
ROWS, INPUTS, OUTPUTS = 21, 96, 64


def base_of(kind: str) -> torch.nn.Module:
    weight, bias = torch.randn(OUTPUTS, INPUTS).bfloat16(), torch.randn(OUTPUTS).bfloat16()
    if kind in ("nf4", "int8"):
        return QuantizedLinear.from_weight(weight, bias, kind)
    base = Linear(INPUTS, OUTPUTS, bias=kind == "bias")
    with torch.no_grad():
        base.weight.copy_(weight)
        if base.bias is not None:
            base.bias.copy_(bias)
    return base.bfloat16()


def adapter_on(kind: str) -> LoraLinear:
    options = {
        "dora": {"dora": True},
        "dropout": {"dropout": 0.3},
    }.get(kind, {})
    module = LoraLinear(base_of(kind), 8, 4.0, **options)
    with torch.no_grad():
        module.lora_B.normal_()
    if kind == "taken off":
        module.begin(module.lora_A, module.lora_B, offset=True)
        with torch.no_grad():
            module.lora_A.add_(torch.randn_like(module.lora_A))
    return module


def everything(module: LoraLinear, x: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """The result of a module and every gradient."""
    torch.manual_seed(3)  # for dropout
    x = x.clone().requires_grad_()
    y = module(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, slope)]


@pytest.mark.parametrize(
    "kind", ["plain", "bias", "nf4", "int8", "dora", "dropout", "taken off", "watched"]
)
def test_the_compiled_way_gives_the_plain_ways_results_and_slopes(kind, monkeypatch):
    torch.manual_seed(0)
    module = adapter_on(kind)
    if kind == "watched":  # somebody sees what the base is given: it is called as a module is
        seen: list[torch.Size] = []
        module.base.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    x, slope = torch.randn(3, 7, INPUTS).bfloat16(), torch.randn(3, 7, OUTPUTS).bfloat16()
    calls: list[str] = []
    real = thin._call
    monkeypatch.setattr(thin, "_call", lambda name, *rest: calls.append(name) or real(name, *rest))
    found = everything(module, x, slope)
    assert {"thin_dots", "thin_add", "thin_outer"} == set(calls)
    count = len(calls)
    monkeypatch.setattr(thin, "takes", lambda *args: False)
    plain = everything(module, x, slope)
    assert len(calls) == count
    for mine, theirs in zip(found, plain, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        room = 2.0**-6 * theirs.abs().max()
        assert (mine - theirs).abs().max() <= room
    if kind == "watched":
        assert seen == [(ROWS, OUTPUTS)] * 2
    with torch.no_grad():
        monkeypatch.undo()
        torch.manual_seed(3)
        torch.testing.assert_close(module(x), found[0], rtol=2.0**-6, atol=2.0**-6)


def test_gradients_of_a_and_b_are_not_rounded():
    torch.manual_seed(0)
    module = adapter_on("plain")
    x, slope = torch.randn(ROWS, INPUTS).bfloat16(), torch.randn(ROWS, OUTPUTS).bfloat16()
    _, _, d_a, d_b = everything(module, x, slope)
    low = F.linear(x, module.lora_A.bfloat16())
    of_low = (module.scale * slope.float() @ module.lora_B.bfloat16().float()).bfloat16()
    torch.testing.assert_close(d_b, module.scale * slope.float().T @ low.float())
    torch.testing.assert_close(d_a, of_low.float().T @ x.float(), rtol=2e-2, atol=2e-2)
    assert not torch.equal(d_b, d_b.bfloat16().float())


@pytest.mark.parametrize("kind", ["plain", "dropout", "taken off"])
def test_nothing_is_kept_of_factors_that_are_parameters(kind):
    torch.manual_seed(0)
    module, kept = adapter_on(kind), []
    x = torch.randn(ROWS, INPUTS).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    there = {p.data_ptr() for p in (x, *module.parameters())}
    casts = [t for t in kept if t.data_ptr() not in there and max(t.shape[-2:]) > ROWS]
    if kind == "taken off":  # A and B with what is taken off beside them, in 16 bits
        assert {t.dtype for t in casts} == {torch.bfloat16} and len(casts) == 2
    else:
        assert all(t.shape == (ROWS, INPUTS) for t in casts)  # of x, by dropout
        assert bool(casts) == (kind == "dropout")


def test_only_what_is_asked_for_is_computed(monkeypatch):
    torch.manual_seed(0)
    module = adapter_on("nf4")
    module.lora_A.requires_grad_(False)
    backs: list[int] = []
    monkeypatch.setattr(QuantizedLinear, "back", lambda *args: backs.append(1))
    module(torch.randn(ROWS, INPUTS).bfloat16()).sum().backward()
    assert module.lora_A.grad is None and module.lora_B.grad is not None
    assert backs == []  # nobody asks for the slope in x: the weight is not expanded again


def test_a_base_that_trains_too_has_its_gradient():
    torch.manual_seed(0)
    module = adapter_on("bias")
    module.base.requires_grad_(True)
    module(torch.randn(ROWS, INPUTS).bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_view_is_not_written_to(monkeypatch):
    torch.manual_seed(0)
    part, low = torch.randn(ROWS, OUTPUTS).bfloat16().view(-1, OUTPUTS), torch.randn(ROWS, 8)
    before, low, b = part.clone(), low.bfloat16(), torch.randn(OUTPUTS, 8)
    found = added(part, low, b, 0.5)
    assert torch.equal(part, before)  # autograd may know it as somebody else's
    monkeypatch.setattr(thin, "takes", lambda *args: False)
    torch.testing.assert_close(found, added(part, low, b, 0.5), rtol=2.0**-7, atol=2.0**-7)


class Experts(torch.nn.Module):
    count, inputs, outputs = 2, INPUTS, OUTPUTS

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2, OUTPUTS, INPUTS).bfloat16())

    def of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight[expert])


def test_experts_take_the_same_products(monkeypatch):
    torch.manual_seed(0)
    starts = [Start(torch.randn(8, INPUTS), torch.randn(OUTPUTS, 8)) for _ in range(2)]
    module = LoraExperts(Experts(), 8, 4.0, start=starts)
    x, slope = torch.randn(ROWS, INPUTS).bfloat16(), torch.randn(ROWS, OUTPUTS).bfloat16()

    def both() -> list[torch.Tensor]:
        asked = x.clone().requires_grad_()
        y = module.of(1, asked)
        wanted = [asked, module.lora_A, module.lora_B]
        return [y.detach(), *torch.autograd.grad(y, wanted, slope)]

    found = both()
    monkeypatch.setattr(thin, "takes", lambda *args: False)
    for mine, theirs in zip(found, both(), strict=True):
        assert (mine - theirs).abs().max() <= 2.0**-6 * theirs.abs().max()
        assert theirs.any()

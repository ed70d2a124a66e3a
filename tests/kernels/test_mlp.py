import pytest
import torch

from ardor.arch import experts as arch_experts
from ardor.arch import mlp as arch_mlp
from ardor.arch import spec as specs
from ardor.arch.experts import Experts
from ardor.arch.gate import ACTIVATIONS
from ardor.arch.mlp import Mlp
from ardor.kernels import mlp as kernel
from ardor.kernels.native import library

# Of the result's norm: x, weights and results are rounded to 8 bits either way, and what is between
# once here and three times in the reference.
RELATIVE = 2.0**-8

needs_kernel = pytest.mark.skipif(
    not hasattr(library(), "gated_mlp"), reason="not compiled on this machine"
)


def bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    g = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / parameter.shape[-1] ** 0.5
    return module.bfloat16()


def rows(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """One entry for each call of the compiled function."""
    calls: list[int] = []
    monkeypatch.setattr(
        arch_mlp, "gated_mlp", lambda *a, **o: calls.append(1) or kernel.gated_mlp(*a, **o)
    )
    return calls


@needs_kernel
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("count", [8, 15, 33, 64, 100, 130, 577])
def test_a_feed_forward_of_any_number_of_rows_equals_the_reference(count, act, taken):
    module = bfloat16(Mlp(48, specs.Mlp(width=80, act=act)))
    x = rows(count, 48)
    with torch.no_grad():
        found = module(x[None])[0]
    wide = {name: p.double() for name, p in module.named_parameters()}
    gate, up = (x.double() @ wide[f"{name}_proj.weight"].T for name in ("gate", "up"))
    exact = (ACTIVATIONS[act](gate) * up) @ wide["down_proj.weight"].T
    assert taken and found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() <= RELATIVE * exact.norm()
    other = (ACTIVATIONS["relu"](gate) * up) @ wide["down_proj.weight"].T
    assert (other - exact).norm() > 0.1 * exact.norm()  # the probe could have failed
    # Row by row: nothing of one is in another.
    rounding = 2.0**-7 * exact.abs().max()
    assert ((found.double() - exact).abs() <= rounding).all()


@needs_kernel
@pytest.mark.parametrize("count", [8, 70, 700])
def test_experts_equal_the_reference(count, taken, monkeypatch):
    spec = specs.Experts(
        count=7,
        expert=specs.Mlp(width=32, act="silu"),
        router=specs.Router(per_token=2, renormalise=True),
    )
    module, x = bfloat16(Experts(64, spec)), rows(count, 64)
    with torch.no_grad():
        found = module(x[None])[0].double()
        routing = module.router(x)
        monkeypatch.setattr(arch_experts, "fused", lambda *a: None)
        plain = module(x[None])[0].double()
    exact = torch.zeros_like(found)
    maps = [p.weight.double() for p in module.experts.children()]
    for expert, (gate, up, down) in enumerate(zip(*maps, strict=True)):
        share = torch.where(routing.chosen == expert, routing.weights, 0.0).sum(-1).double()
        made = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        exact += share[:, None] * made
    assert taken == [1]
    error = (found - exact).norm()
    assert error <= RELATIVE * exact.norm()
    assert error <= (plain - exact).norm()  # rounded less often


@needs_kernel
def test_it_takes_what_it_can_and_leaves_the_rest(taken):
    plain = bfloat16(Mlp(48, specs.Mlp(width=80, act="silu")))
    x = rows(20, 48)
    with torch.no_grad():
        plain(x)
        assert taken == [1]
        plain(x[:7])
        plain.float()(x.float())
        for kind in (
            specs.Mlp(width=80, act="relu"),
            specs.Mlp(width=80, act="silu", gated=False),
            specs.Mlp(width=80, act="silu", bias=True),
            specs.Mlp(width=80, act="silu", limit=1.0),
            specs.Mlp(width=80, act="silu", shift=1.0),
            specs.Mlp(width=72, act="silu"),
        ):
            bfloat16(Mlp(48, kind))(x)
        wrapped = bfloat16(Mlp(48, specs.Mlp(width=80, act="silu")))
        wrapped.up_proj = torch.nn.Linear(48, 80, bias=False).bfloat16()
        wrapped(x)
    trained = bfloat16(Mlp(48, specs.Mlp(width=80, act="silu")))
    trained(x).float().sum().backward()
    assert taken == [1] and trained.up_proj.weight.grad.any()


@needs_kernel
def test_who_watches_a_part_sees_what_goes_through_it(taken):
    """EVA and doctor look at the inputs and outputs of maps that this function would skip."""
    module, x, seen = bfloat16(Mlp(48, specs.Mlp(width=80, act="silu"))), rows(20, 48), []
    for part in (module.gate_proj, module.up_proj, module.down_proj):
        for watch in (part.register_forward_pre_hook, part.register_forward_hook):
            hook = watch(lambda *given: seen.append(given[1][0].shape))
            with torch.no_grad():
                module(x)
            assert not taken and seen.pop()[0] == 20
            hook.remove()
    with torch.no_grad():
        module(x)
    assert taken and not seen

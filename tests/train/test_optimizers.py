"""Every optimizer: its update, its state after a stop, and what it keeps, in bytes."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ardor.errors import ConfigError
from ardor.memory.optimizers import STATES
from ardor.train.config import Optimisation
from ardor.train.lion import Lion
from ardor.train.optim import OPTIMIZERS, Optimizer
from ardor.train.stepwise import round_stochastically

SHAPES = {
    "embed_tokens.weight": (96, 48),
    "layers.0.q_proj.weight": (64, 80),
    "layers.0.ffn.experts.weight": (3, 48, 40),
    "norm.weight": (48,),
}


def settings(optim: str, **given: Any) -> Optimisation:
    constant = {"lr_scheduler_type": "constant"} if optim == "schedule_free_adamw" else {}
    momentum = {"sgd_momentum": 0.9} if optim == "sgd" else {}
    return Optimisation(optim=optim, weight_decay=0.1, **{**constant, **momentum, **given})


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in SHAPES.items()}


def walk(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        optimizer.set_rate(0.01 / (step + 1))
        for parameter in optimizer.parameters.values():
            gradient = torch.randn(parameter.shape, generator=g).to(parameter.dtype)
            if optimizer.in_backward:
                (parameter * gradient).sum().backward()
            else:
                parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


WAYS: dict[str, tuple[dict[str, Any], torch.dtype, torch.device | None]] = {
    "all at once": ({}, torch.float32, None),
    "in bfloat16": ({}, torch.bfloat16, None),
    "states elsewhere": ({}, torch.float32, torch.device("cpu")),
    "in backward": (
        {"optimizer_in_backward": True, "max_grad_norm": 0.0},
        torch.float32,
        None,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_state_that_is_restored_goes_on_bitwise(optim, way):
    given, dtype, home = WAYS[way]
    config = settings(optim, **given)
    torch.manual_seed(0)
    whole = Optimizer(parameters(dtype), config, home=home)
    walk(whole, range(3))
    state = {name: value.clone() for name, value in whole.state().items()}
    with whole.evaluated_weights():
        weights = {name: p.detach().clone() for name, p in whole.parameters.items()}
    random = torch.get_rng_state()
    walk(whole, range(3, 6))

    held = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    resumed = Optimizer(held, config, home=home)
    resumed.restore(dict(sorted(state.items(), reverse=True)))  # files keep no order
    torch.set_rng_state(random)
    walk(resumed, range(3, 6))
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
    again, wanted = resumed.state(), whole.state()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)

    forgetful = Optimizer({n: nn.Parameter(v.clone()) for n, v in weights.items()}, config)
    walk(forgetful, range(3, 6))  # the state matters, or the test would pass without it
    assert any(not torch.equal(forgetful.parameters[n], p) for n, p in whole.parameters.items())


@pytest.mark.parametrize("way", ["states elsewhere", "in backward"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_one_by_one_is_all_at_once(optim, way):
    given, dtype, home = WAYS[way]
    together, apart = (
        Optimizer(parameters(dtype), settings(optim)),
        Optimizer(parameters(dtype), settings(optim, **given), home=home),
    )
    walk(together, range(4))
    walk(apart, range(4))
    for name, parameter in together.parameters.items():
        torch.testing.assert_close(apart.parameters[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bytes_of_a_state_are_known(optim, dtype):
    config = settings(optim, sgd_momentum=0.0)
    optimizer = Optimizer(parameters(dtype), config)
    walk(optimizer, range(2))
    for name, parameter in optimizer.parameters.items():
        held = {
            key: value
            for key, value in optimizer.state().items()
            if key.startswith(f"{name}|") and value.ndim > 0 and not key.endswith("|trained")
        }
        found = sum(value.nbytes for value in held.values())
        assert found == STATES[optim](name, tuple(parameter.shape), dtype.itemsize), (name, held)


# --- updates ---


def test_a_step_of_lion_is_the_paper_s():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    momentum, expected = torch.zeros(3), weight.detach().clone()
    for gradient in (torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-0.2, -1.0, 2.0])):
        weight.grad = gradient.clone()
        optimizer.step()
        update = (0.9 * momentum + 0.1 * gradient).sign()
        expected = expected - 0.1 * (update + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(weight.detach(), expected)


def test_eight_bits_stay_near_thirty_two():
    for narrow, wide in (("adamw_8bit", "adamw"), ("lion_8bit", "lion")):
        optimizers = [Optimizer(parameters(), settings(optim)) for optim in (narrow, wide)]
        for optimizer in optimizers:
            walk(optimizer, range(4))
        start = parameters()
        for name, parameter in optimizers[1].parameters.items():
            moved = (parameter - start[name]).norm()
            apart = (optimizers[0].parameters[name] - parameter).norm()
            assert apart < 0.2 * moved, (narrow, name)


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    muon, adamw = (Optimizer(parameters(), settings(optim)) for optim in ("muon", "adamw"))
    walk(muon, range(2))
    walk(adamw, range(2))
    same = {n for n in SHAPES if torch.equal(muon.parameters[n], adamw.parameters[n])}
    assert same == SHAPES.keys() - {"layers.0.q_proj.weight"}


def test_what_is_judged_of_a_schedule_free_run_is_the_average_and_training_goes_on_as_it_was():
    looked, plain = (Optimizer(parameters(), settings("schedule_free_adamw")) for _ in range(2))
    for step in range(4):
        walk(looked, range(step, step + 1))
        walk(plain, range(step, step + 1))
        before = {name: p.detach().clone() for name, p in looked.parameters.items()}
        with looked.evaluated_weights():
            moved = [not torch.equal(p, before[n]) for n, p in looked.parameters.items()]
            assert all(moved) == (step > 0)  # one point is its own average
    for name, parameter in plain.parameters.items():
        assert torch.equal(looked.parameters[name], parameter)


def test_rates_are_shares():
    shares = {"norm.weight": 0.5, "embed_tokens.weight": 0.0}
    optimizer = Optimizer(parameters(), Optimisation(), shares)
    start = parameters()
    walk(optimizer, range(1))
    moved = {n: (p - start[n]).abs().max().item() for n, p in optimizer.parameters.items()}
    assert moved["embed_tokens.weight"] == 0
    assert moved["norm.weight"] == pytest.approx(moved["layers.0.q_proj.weight"] / 2, rel=1e-3)


# --- bfloat16 ---


def test_stochastic_rounding_gives_neighbours_whose_mean_is_the_number():
    torch.manual_seed(0)
    x = torch.tensor([1.0, 1 + 1 / 512, -3.001, 1e-30, 0.0])
    drawn = torch.stack([round_stochastically(x).double() for _ in range(20_000)])
    low, high = drawn.min(0).values, drawn.max(0).values
    assert torch.equal(drawn[:, 0].unique(), torch.ones(1).double())  # bfloat16 has it: no noise
    assert ((low <= x) & (x <= high)).all()
    assert all(len(column.unique()) <= 2 for column in drawn.T)
    torch.testing.assert_close(drawn.mean(0), x.double(), rtol=2e-4, atol=1e-32)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_stochastically(odd)[:2], odd[:2].bfloat16())
    assert round_stochastically(odd)[2].isnan()


def stalls(step: Callable[[nn.Parameter], None]) -> float:
    """How far a weight of 0.02 gets in 50 steps of AdamW at 2e-5, of the 1e-3 it should."""
    weight = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    start = float(weight[0, 0].detach())
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        step(weight)
    return (start - float(weight.detach().float().mean())) / 1e-3


def test_small_updates_are_lost_by_plain_rounding_and_not_by_ours():
    made: dict[str, Any] = {}

    def plain(weight: nn.Parameter) -> None:
        made.setdefault("plain", torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)).step()

    def ours(weight: nn.Parameter) -> None:
        optimizer = made.setdefault("ours", Optimizer({"w": weight}, Optimisation()))
        optimizer.set_rate(2e-5)
        optimizer.step()

    torch.manual_seed(0)
    assert stalls(plain) == pytest.approx(0.0, abs=0.05)
    assert stalls(ours) == pytest.approx(1.0, abs=0.1)


# --- bad input ---


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    for optim, package in (("adamw_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree")):
        monkeypatch.setitem(sys.modules, package, None)
        message = f"optim={optim} needs the package {package}, .* pip install {package}"
        with pytest.raises(ConfigError, match=message):
            Optimizer(parameters(), settings(optim))


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="there is nothing to train"):
        Optimizer({}, Optimisation())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"optimizer_in_backward": True, "gradient_accumulation_steps": 2},
            "optimizer_in_backward with gradient_accumulation_steps=2 would update after every",
        ),
        ({"optimizer_in_backward": True}, "max_grad_norm=1: the norm of all gradients is not"),
        ({"optim": "schedule_free_adamw"}, "give --lr-scheduler-type constant"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Optimisation(**given)
    allowed = replace(settings("adamw"), optimizer_in_backward=True, max_grad_norm=0.0)
    assert allowed.optimizer_in_backward


def test_the_norm_is_known_after_updates_in_the_backward_pass():
    config = Optimisation(optimizer_in_backward=True, max_grad_norm=0.0)
    optimizer = Optimizer(parameters(), config)
    optimizer.set_rate(0.0)
    g = torch.Generator().manual_seed(3)
    gradients: list[Tensor] = []
    for parameter in optimizer.parameters.values():
        gradients.append(torch.randn(parameter.shape, generator=g))
        (parameter * gradients[-1]).sum().backward()
        assert parameter.grad is None  # it is forgotten at once
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert optimizer.norm_in_backward() == pytest.approx(float(norm), rel=1e-6)
    assert optimizer.norm_in_backward() == 0.0

"""The one loop: its gradient is that of one batch, and its settings are what is done."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ardor.errors import CheckpointError, ConfigError
from ardor.loss import IGNORE, next_token_loss
from ardor.train import finetune
from ardor.train.config import Finetune, Optimisation
from ardor.train.optim import Optimizer, trainable
from ardor.train.schedule import rate_share
from ardor.train.trainer import Trainer, document_loss

from ..tiny import sentences, write_rows

pytestmark = pytest.mark.sweep

# --- one step ---


def gradients(trainer: Trainer, monkeypatch, steps: int = 1) -> list[dict[str, Tensor]]:
    """What the optimizer was given in each of the first steps, with the weights left alone."""
    seen = []

    def step() -> None:
        seen.append(
            {k: p.grad.clone() for k, p in trainer.parameters.items() if p.grad is not None}
        )

    monkeypatch.setattr(trainer.optimizer, "step", step)
    windows = trainer._windows()
    for _ in range(steps):
        trainer._step(*next(windows))
    return seen


def test_the_gradient_of_micro_batches_is_that_of_one_batch(make, dataset, monkeypatch):
    whole = make(per_device_train_batch_size=10, max_grad_norm=0.0)
    parts = make(per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.0)
    sizes = [len(members) for members in parts.plan.epoch(0)]
    assert sizes == [4, 4, 2]  # the last micro-batch is short
    wanted, found = gradients(whole, monkeypatch)[0], gradients(parts, monkeypatch)[0]
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)

    # The usual mistake, to divide each micro-batch by its own targets, is a different gradient.
    probe = make()
    batches = [probe.plan.batch(members) for members in parts.plan.epoch(0)]
    counts = [int((batch.targets != IGNORE).sum()) for batch in batches]
    assert len(set(counts)) == 3
    for batch, count in zip(batches, counts, strict=True):
        (document_loss(probe.decoder, batch).nats / count / len(batches)).backward()
    assert any(
        not torch.allclose(p.grad, wanted[name], rtol=1e-3, atol=1e-5)
        for name, p in probe.parameters.items()
    )


def test_the_short_window_at_the_end_of_an_epoch_is_divided_by_its_own_targets(
    make, dataset, monkeypatch
):
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.0)
    assert len(trainer.plan.epoch(0)) == 5 and trainer.steps == 2
    found = gradients(trainer, monkeypatch, steps=3)
    rest = [i for members in trainer.plan.epoch(0)[3:] for i in members]
    probe = make()
    batch = probe.plan.batch(tuple(rest))
    logits = probe.decoder.token_logits(
        torch.cat(  # one document at a time: no ragged row at all
            [
                probe.decoder.hidden(part[None])[0]
                for part in batch.tokens[0].split(list(batch.lengths))
            ]
        )
    )
    loss = next_token_loss(logits[None], batch.targets)
    (loss.nats / loss.targets).backward()
    for name, parameter in probe.parameters.items():
        torch.testing.assert_close(found[1][name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert trainer.progress.epoch == 1 and trainer.progress.index == 3


def test_the_reported_loss_is_that_of_the_whole_window(make, dataset):
    trainer = make(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    batches = [trainer.plan.batch(members) for members in trainer.plan.epoch(0)[:2]]
    losses = [document_loss(trainer.decoder, batch) for batch in batches]
    event = trainer._step(*next(trainer._windows()))
    targets = sum(int(loss.targets) for loss in losses)
    assert event["targets"] == targets
    assert event["loss"] == pytest.approx(
        sum(loss.nats.item() for loss in losses) / targets, rel=1e-6
    )
    assert event["tokens"] == sum(batch.tokens.numel() for batch in batches)


def global_norm(found: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))


def test_clipping_bounds_the_norm_of_all_gradients_together(make, monkeypatch):
    free = gradients(make(max_grad_norm=0.0), monkeypatch)[0]
    norm = global_norm(free)
    clipped = gradients(make(max_grad_norm=norm / 4), monkeypatch)[0]
    assert global_norm(clipped) == pytest.approx(norm / 4, rel=1e-4)
    for name, gradient in free.items():  # one factor for all: the direction stays
        torch.testing.assert_close(clipped[name], gradient / 4, rtol=1e-4, atol=1e-9)
    same = gradients(make(max_grad_norm=norm * 4), monkeypatch)[0]
    assert all(torch.equal(same[name], gradient) for name, gradient in free.items())


def test_the_event_reports_the_norm_before_clipping(make, monkeypatch):
    trainer = make(max_grad_norm=1e-3)
    free = gradients(make(max_grad_norm=0.0), monkeypatch)[0]
    event = trainer._step(*next(trainer._windows()))
    assert event["grad_norm"] == pytest.approx(global_norm(free), rel=1e-5)


# --- optimizer and schedule ---


def test_vectors_do_not_decay_and_matrices_do():
    parameters = {
        "matrix": nn.Parameter(torch.ones(2, 2)),
        "vector": nn.Parameter(torch.ones(2)),
    }
    optimizer = Optimizer(parameters, Optimisation(weight_decay=0.5))
    optimizer.set_rate(0.1)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters["vector"], torch.ones(2))
    torch.testing.assert_close(parameters["matrix"], torch.full((2, 2), 1 - 0.1 * 0.5))


def test_one_step_of_adamw_is_the_paper_s():
    g = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    weight = nn.Parameter(start.clone())
    settings = Optimisation(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.1)
    optimizer = Optimizer({"w": weight}, settings)
    optimizer.set_rate(0.01)
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    expected = start.clone()
    for step in (1, 2):
        weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        unbiased = first / (1 - 0.8**step), second / (1 - 0.9**step)
        expected = (
            expected - 0.01 * 0.1 * expected - 0.01 * unbiased[0] / (unbiased[1].sqrt() + 1e-6)
        )
        torch.testing.assert_close(weight.detach(), expected)


def test_only_what_takes_a_gradient_is_trained_and_the_state_fits_by_name():
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    parameters = trainable(module)
    assert list(parameters) == ["weight"]
    optimizer = Optimizer(parameters, Optimisation())
    optimizer.set_rate(0.1)
    parameters["weight"].grad = torch.ones(3, 2)
    optimizer.step()
    state = optimizer.state()
    assert set(state) == {"weight|step", "weight|exp_avg", "weight|exp_avg_sq"}
    optimizer.restore(state)
    both = Optimizer({**parameters, "bias": module.bias}, Optimisation())
    with pytest.raises(CheckpointError, match="does not fit .*'bias'"):
        both.restore(state)
    with pytest.raises(CheckpointError, match="does not fit .*'weight'"):
        Optimizer({"bias": module.bias}, Optimisation()).restore(state)


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    def shares(kind, warmup=4, steps=20, floor=0.0):
        return [
            rate_share(s, steps=steps, warmup=warmup, kind=kind, min_share=floor)
            for s in range(steps)
        ]

    cosine = shares("cosine", floor=0.1)
    assert cosine[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(cosine[4:]))
    assert cosine[12] == pytest.approx(0.1 + 0.9 / 2)  # halfway through the decay
    assert 0.1 < cosine[-1] < 0.12
    linear = shares("linear")
    assert linear[4:] == pytest.approx([1 - i / 16 for i in range(16)])
    assert set(shares("constant")[4:]) == {1.0}
    assert shares("constant", warmup=0)[0] == shares("cosine", warmup=0)[0] == 1.0


def test_the_rate_that_is_used_is_the_schedule_s(make):
    trainer = make(max_steps=8, warmup_ratio=0.25, learning_rate=3e-3, min_lr_ratio=0.1)
    rates = [event["learning_rate"] for event in trainer.events() if event["kind"] == "train"]
    wanted = [
        3e-3 * rate_share(s, steps=8, warmup=2, kind="cosine", min_share=0.1) for s in range(8)
    ]
    assert rates == wanted
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {wanted[-1]}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 5),  # 10 examples in twos
        ({"num_train_epochs": 3.0}, 15),
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 1.2}, 6),
        ({"num_train_epochs": 0.01}, 1),
        ({"gradient_accumulation_steps": 3}, 2),  # windows of 3 and 2
        ({"gradient_accumulation_steps": 3, "num_train_epochs": 2.0}, 4),
        ({"num_train_epochs": 3.0, "max_steps": 7}, 7),
    ],
)
def test_epochs_are_counted_in_steps(make, settings, steps):
    assert make(per_device_train_batch_size=2, **settings).steps == steps


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"logging_steps": 0}, "logging_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"num_train_epochs": -1.0}, "num_train_epochs=-1.0 must be above 0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be at least 0 and below 1"),
        ({"warmup_ratio": 3.0}, "warmup_ratio=3.0 must be from 0 to 1"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan must be at least 0 and finite"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf must be above 0 and finite"),
    ],
)
def test_a_number_outside_its_range_is_refused(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Optimisation(**setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ()}, "target_modules is empty; name at least one linear"),
        ({"method": "lora", "quantization": "nf4-dq"}, "quantization=nf4-dq is for method qlora"),
        ({"method": "full", "lora_r": 4}, "lora_r=4: method full trains every weight"),
        ({"method": "full", "quantization": "nf4-dq"}, "and method full trains on whole weights"),
    ],
)
def test_settings_that_ask_for_what_will_not_be_done_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Finetune(model="m", data="d", **settings)
    assert Finetune(model="m", data="d", method="full")  # defaults ask for nothing


def test_a_template_comes_to_a_model_that_learns_to_chat_and_to_no_other(base, pairs, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]}
        for p, c in zip(sentences(4, 1), sentences(4, 2), strict=True)
    ]
    for name, data, template in (
        ("pairs", pairs, None),
        ("texts", write_rows(tmp_path / "t.jsonl", [{"text": t} for t in sentences(4)]), None),
        ("chats", write_rows(tmp_path / "c.jsonl", chats), "ChatML"),
    ):
        config = Finetune(model=str(base("llama")), data=str(data), output=tmp_path / name)
        found = finetune.prepare(config).model
        assert (found.template and found.template.name) == template
        assert found.adapter is not None
        assert bool(found.adapter.trainable_token_indices) == (template is not None)

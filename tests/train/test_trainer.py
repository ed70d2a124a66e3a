"""The one loop: its gradient is that of one batch, and stopping it leaves no trace."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ardor.data.dataset import Dataset
from ardor.data.readers import Row
from ardor.errors import CheckpointError, ConfigError
from ardor.files.runs import checkpoints, newest_checkpoint
from ardor.generate.settings import Settings
from ardor.load import load_model, tokenizer_of
from ardor.loss import IGNORE, next_token_loss
from ardor.train import evaluate as evaluate_module
from ardor.train import finetune
from ardor.train import trainer as trainer_module
from ardor.train.config import Finetune, Optimisation, Train
from ardor.train.evaluate import evaluate
from ardor.train.optim import Optimizer, trainable
from ardor.train.schedule import rate_share
from ardor.train.trainer import Diverged, Trainer, _differences, document_loss

from ..tiny import sentences, write_rows
from .conftest import figures, finish, prepare, train_config, tune_config

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


# --- stopping and going on ---


def go_on(config: Train | Finetune, **changed: Any) -> list[dict]:
    run = prepare(replace(config, resume=True, **changed))
    assert run.resumed == (newest_checkpoint(run.folder) is not None)
    return finish(run)


def stop_after(config: Train | Finetune, step: int) -> None:
    """Leave the run as a killed process does: no checkpoint of its own."""
    for event in prepare(config).events():
        if event["kind"] == "train" and event["step"] == step:
            return
    raise AssertionError(f"the run has no step {step}")


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every file; of the trainer's record all but the length of metrics.jsonl, which has times."""
    found = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    record = json.loads(found["trainer.json"])
    del record["metrics_bytes"]
    found["trainer.json"] = json.dumps(record).encode()
    return found


def assert_same_run(found: Path, wanted: Path) -> None:
    assert figures(found) == figures(wanted)
    last, other = newest_checkpoint(found), newest_checkpoint(wanted)
    assert last is not None and other is not None and last.name == other.name
    ours, theirs = contents(last), contents(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    """A run from scratch that was never stopped, with checkpoints at all even steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(prepare(train_config(texts, folder)))
    return folder


def test_the_runs_to_be_stopped_are_worth_stopping(whole):
    rows = [row for row in figures(whole) if row["kind"] == "train"]
    assert len(rows) == 6 and [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert len({row["targets"] for row in rows}) > 3  # unequal windows
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0]
    indices = [
        json.loads((path / "trainer.json").read_text())["index"] for path in checkpoints(whole)
    ]
    assert indices == [6, 3, 8]  # in the middle of an epoch, too; its last window is short


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_run_from_scratch_is_bitwise_the_uninterrupted_one(whole, texts, tmp_path, step):
    config = train_config(texts, tmp_path / "run")
    stop_after(config, step)
    torch.manual_seed(99)  # another process has another state
    go_on(config)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_is_stopped_twice_is_bitwise_the_uninterrupted_one(whole, texts, tmp_path):
    config = train_config(texts, tmp_path / "run")
    stop_after(config, 3)
    stop_after(replace(config, resume=True), 5)
    go_on(config)
    assert_same_run(tmp_path / "run", whole)


def test_the_comparison_of_runs_can_fail(whole, texts, tmp_path):
    finish(prepare(train_config(texts, tmp_path / "run", seed=1)))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", whole)


TUNINGS = {
    "lora": ("llama", {"method": "lora"}),
    "lora on gpt2": ("gpt2", {"method": "lora"}),
    "lora in bfloat16": ("llama", {"method": "lora", "dtype": "bfloat16"}),
    "lora with token rows": ("llama", {"method": "lora", "train_control_tokens": "yes"}),
    "some targets": ("llama", {"method": "lora", "target_modules": ("q_proj", "mlp.up_proj")}),
    "qlora": ("llama", {"method": "qlora"}),
    "full": ("llama", {"method": "full"}),
    "full on gpt2": ("gpt2", {"method": "full"}),
    "in bfloat16": ("llama", {"method": "full", "master_dtype": "bfloat16", "optim": "lion"}),
    "averaged": (
        "llama",
        {
            "method": "full",
            "optim": "schedule_free_adamw",
            "lr_scheduler_type": "constant",
            "eval_steps": 1,
        },
    ),
    "averaged in bfloat16": (
        "llama",
        {
            "method": "full",
            "optim": "schedule_free_adamw",
            "lr_scheduler_type": "constant",
            "master_dtype": "bfloat16",
        },
    ),
    "muon": ("llama", {"method": "full", "optim": "muon", "lr_scheduler_type": "wsd"}),
    "8 bits": ("llama", {"method": "full", "optim": "adamw_8bit"}),
    "noise, recomputed, states elsewhere": (
        "llama",
        {
            "neftune_noise_alpha": 5.0,
            "gradient_checkpointing": "layers",
            "offload_optimizer": True,
            "loraplus_lr_ratio": 4.0,
        },
    ),
    "in the backward pass": (
        "llama",
        {
            "method": "full",
            "optim": "adafactor",
            "optimizer_in_backward": True,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 1,
            "max_steps": 5,
            "freeze": ("embed",),
            "train_sampling_strategy": "group_by_length",
        },
    ),
}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_resumed_tuning_is_bitwise_the_uninterrupted_one(base, pairs, tmp_path, tuning):
    family, settings = TUNINGS[tuning]
    config = tune_config(base(family), pairs, tmp_path / "whole", **settings)
    finish(prepare(config))
    for step in (3, 4):
        stopped = replace(config, output=tmp_path / f"stopped-{step}")
        stop_after(stopped, step)
        torch.manual_seed(99)
        go_on(stopped)
        assert_same_run(tmp_path / f"stopped-{step}", tmp_path / "whole")


def test_dropout_draws_so_that_its_state_must_be_resumed(base, pairs, tmp_path):
    config = tune_config(base("llama"), pairs, tmp_path / "whole", method="lora")
    finish(prepare(config))
    stopped = replace(config, output=tmp_path / "stopped")
    stop_after(stopped, 3)
    run = prepare(replace(stopped, resume=True))
    torch.manual_seed(99)  # after the state was restored: as if it had not been
    finish(run)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("moment", ["train", "eval", "checkpoint", "before"])
def test_a_requested_stop_leaves_a_checkpoint_of_its_last_step(whole, texts, tmp_path, moment):
    config = train_config(texts, tmp_path / "run", eval_steps=1, save_steps=4)
    run = prepare(config)
    if moment == "before":
        run.trainer.stop_requested = True
    steps = 0
    for event in run.events():
        steps = event["step"]
        if event["kind"] == moment and steps >= 3:
            run.trainer.stop_requested = True
    newest = newest_checkpoint(run.folder)
    if moment == "before":
        assert newest is None and steps == 0
    else:
        assert newest is not None and newest.name == f"checkpoint-{steps}"
        assert steps == (4 if moment == "checkpoint" else 3)
    go_on(config)
    reference = [row for row in figures(whole) if row["kind"] == "train"]
    assert [row for row in figures(run.folder) if row["kind"] == "train"] == reference
    last, other = newest_checkpoint(run.folder), newest_checkpoint(whole)
    assert last is not None and other is not None
    for name in ("model.safetensors", "trainer.safetensors"):
        assert contents(last)[name] == contents(other)[name]


def test_how_often_to_log_evaluate_and_save_may_change_on_resume(whole, texts, tmp_path):
    config = train_config(texts, tmp_path / "run", logging_steps=2, eval_steps=5, save_steps=3)
    stop_after(config, 3)
    go_on(config, logging_steps=1, eval_steps=1, save_steps=1, save_total_limit=1)
    kept = checkpoints(tmp_path / "run")
    assert [path.name for path in kept] == ["checkpoint-6"]
    other = newest_checkpoint(whole)
    assert other is not None
    for name in ("model.safetensors", "trainer.safetensors"):
        assert contents(kept[0])[name] == contents(other)[name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 5e-4}, r"learning_rate: 0.002, now 0.0005"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps: 3, now 2"),
        ({"seed": 3, "max_steps": 9}, r"max_steps: None, now 9, seed: 0, now 3"),
        ({"max_length": 40}, r"max_length: 48, now 40"),
    ],
)
def test_a_run_refuses_to_resume_with_other_settings(texts, tmp_path, changed, message):
    config = train_config(texts, tmp_path / "run")
    stop_after(config, 3)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=f"checkpoint-2 .*other settings .{message}"):
        prepare(replace(config, resume=True, **changed))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_refuses_to_resume_with_other_data(texts, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(texts.read_text())
    config = train_config(mine, tmp_path / "run")
    stop_after(config, 3)
    mine.write_text(texts.read_text().replace("cat", "dog", 1))
    with pytest.raises(CheckpointError, match="checkpoint-2 was trained on other data"):
        prepare(replace(config, resume=True))
    moved = tmp_path / "moved.jsonl"
    moved.write_text(texts.read_text())
    assert prepare(replace(config, data=str(moved), resume=True)).resumed  # the same elsewhere


def test_a_whole_number_given_as_a_fraction_is_the_same_setting():
    assert not _differences({"num_train_epochs": 2}, {"num_train_epochs": 2.0})
    assert (
        _differences({"seed": 0}, {"seed": None, "new": 1}) == "new: None, now 1, seed: 0, now None"
    )


def test_resuming_does_not_write_to_the_checkpoint_it_came_from(whole, texts, tmp_path):
    config = train_config(texts, tmp_path / "run")
    stop_after(config, 3)
    first = checkpoints(tmp_path / "run")[0]
    before = contents(first)
    go_on(config)
    assert contents(first) == before


# --- checkpoints ---


def test_the_newest_checkpoints_are_kept(texts, tmp_path):
    config = train_config(texts, tmp_path / "run", save_steps=1, save_total_limit=2)
    seen = []
    for event in prepare(config).events():
        if event["kind"] == "checkpoint":
            seen.append([path.name for path in checkpoints(tmp_path / "run")])
    assert seen[:3] == [
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
    ]
    assert seen[-1] == ["checkpoint-5", "checkpoint-6"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_checkpoints(
    texts, tmp_path, monkeypatch
):
    config = train_config(texts, tmp_path / "run")
    run = prepare(config)
    real = trainer_module.document_loss

    def poisoned(decoder, batch, routings):
        loss = real(decoder, batch, routings)
        return loss._replace(nats=loss.nats * (math.nan if run.trainer.progress.step == 3 else 1))

    monkeypatch.setattr(trainer_module, "document_loss", poisoned)
    before = None
    with pytest.raises(Diverged, match=r"loss \(nan\).* at step 4; .*checkpoint-2 is whole"):
        for event in run.events():
            if event["kind"] == "checkpoint":
                before = contents(Path(event["path"]))
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-2"]
    assert contents(checkpoints(run.folder)[0]) == before
    assert figures(run.folder)[-1]["step"] == 3
    monkeypatch.undo()
    assert [event["kind"] for event in go_on(config)][-2:] == ["checkpoint", "memory"]


def test_weights_that_are_not_finite_are_not_saved(make):
    trainer = make(max_steps=1)

    def step() -> None:
        with torch.no_grad():
            trainer.parameters["norm.weight"][0] = math.inf

    trainer.optimizer.step = step  # as an update does that overflows
    with pytest.raises(Diverged, match=r"norm.weight is not finite after step 1; no checkpoint"):
        list(trainer.events())
    assert not checkpoints(trainer.run)


@pytest.mark.parametrize("damage", ["cut", "gone", "json", "field"])
def test_a_damaged_trainer_state_is_named_with_the_remedy(texts, tmp_path, damage):
    config = train_config(texts, tmp_path / "run", max_steps=2)
    finish(prepare(config))
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    tensors, state = newest / "trainer.safetensors", newest / "trainer.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "json":
        state.write_text(state.read_text()[:20])
    else:
        state.write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="checkpoint-2 is damaged: .*delete it to resume"):
        prepare(replace(config, resume=True))
    state.unlink()
    with pytest.raises(CheckpointError, match="holds weights but no trainer.json"):
        prepare(replace(config, resume=True))


# --- evaluation ---


def test_evaluation_does_not_depend_on_how_it_is_batched(base, monkeypatch):
    model = load_model(base("llama"), dtype="float32")
    heldout = Dataset.from_documents(sentences(30, seed=7), tokenizer_of(model))
    found = evaluate(model, heldout)
    losses = []
    for tokens in (1, 70, 10_000):  # one document at a time; a few; all of them
        monkeypatch.setattr(evaluate_module, "TOKENS", tokens)
        row = evaluate(model, heldout)
        assert row["targets"] == found["targets"] == heldout.census.targets
        losses.append(row["loss"])
    assert losses == pytest.approx([found["loss"]] * 3, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    each = []
    for index in range(len(heldout)):
        ids = torch.tensor([heldout[index].tokens])
        loss = next_token_loss(
            model.decoder.token_logits(model.decoder.hidden(ids))[:, :-1], ids[:, 1:]
        )
        each.append(float(loss.nats))
    assert found["loss"] == pytest.approx(sum(each) / found["targets"], rel=1e-6)


def test_evaluating_more_often_changes_no_weight(whole, texts, tmp_path):
    config = train_config(
        texts, tmp_path / "run", eval_steps=1, eval_on_start=True, sample_prompts=("the cat",)
    )
    events = finish(prepare(config))
    assert [event["step"] for event in events if event["kind"] == "eval"] == list(range(7))
    samples = [event for event in events if event["kind"] == "sample"]
    assert len(samples) == 7 and {event["prompt"] for event in samples} == {"the cat"}
    last, other = newest_checkpoint(tmp_path / "run"), newest_checkpoint(whole)
    assert last is not None and other is not None
    assert contents(last)["model.safetensors"] == contents(other)["model.safetensors"]


def test_of_one_long_document_the_end_is_held_out_and_of_few_examples_nothing(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(sentences(200)))
    run = prepare(train_config(path, tmp_path / "a", max_steps=1))
    assert run.heldout is not None and len(run.heldout) == round(
        0.1 * len([*run.train, *run.heldout])
    )
    path.write_text("the cat sat on the mat.")
    assert prepare(train_config(path, tmp_path / "b", max_steps=1)).heldout is None


def test_the_stop_rate_counts_answers_to_held_out_prompts_that_end(base, monkeypatch):
    model = load_model(base("llama"), dtype="float32")
    rows = [
        Row({"prompt": p, "completion": f" {c}"}, f"row {i}")
        for i, (p, c) in enumerate(zip(sentences(9, 1), sentences(9, 2), strict=True))
    ]
    heldout = Dataset.build(rows, tokenizer_of(model))
    asked = []
    real = evaluate_module.generate

    def generate(model, prompts, settings):
        asked.extend(prompts)
        return real(model, prompts, settings)

    monkeypatch.setattr(evaluate_module, "generate", generate)
    monkeypatch.setattr(evaluate_module, "ANSWERS", 4)  # several batches
    monkeypatch.setattr(evaluate_module, "ANSWER_TOKENS", 3)
    free = evaluate(model, heldout, answers=7)
    assert [tokenizer_of(model).decode(ids) for ids in asked] == sentences(9, 1)[:7]
    answers = real(model, asked, Settings(max_new_tokens=3, temperature=0.0))
    assert free["stop_rate"] == sum(a.stop_reason == "stop_token" for a in answers) / 7
    firsts = [answer.tokens[0] for answer in answers]
    model.stops = replace(model.stops, ids=frozenset(firsts[:1]))
    assert evaluate(model, heldout, answers=7)["stop_rate"] >= firsts.count(firsts[0]) / 7 > 0
    model.stops = replace(model.stops, ids=frozenset(range(model.decoder.spec.vocab)))
    assert evaluate(model, heldout, answers=99)["stop_rate"] == 1.0
    model.stops = replace(model.stops, ids=frozenset())
    assert evaluate(model, heldout, answers=2)["stop_rate"] == 0.0
    assert "stop_rate" not in evaluate(model, heldout)

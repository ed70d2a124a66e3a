"""Stopping a run leaves no trace: what goes on from a checkpoint is the run that never stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ardor.errors import CheckpointError
from ardor.files.runs import checkpoints, newest_checkpoint
from ardor.train import trainer as trainer_module
from ardor.train.config import Finetune, Train
from ardor.train.trainer import Diverged, _differences

from .conftest import figures, finish, prepare, train_config, tune_config
from .ends import contents

pytestmark = pytest.mark.sweep


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
    "biases of adapters": ("llama", {"lora_bias": True}),
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

    def poisoned(decoder, batch, routings, **how):
        loss = real(decoder, batch, routings, **how)
        return loss._replace(nats=loss.nats + (math.nan if run.trainer.progress.step == 3 else 0))

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

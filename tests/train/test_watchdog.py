"""A run that goes wrong ends at once, with the batch that did it in a file."""

import json
import math
import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from ardor.cli.main import main
from ardor.errors import ConfigError, DataError
from ardor.files.runs import newest_checkpoint
from ardor.load import load_model
from ardor.loss import IGNORE
from ardor.train import trainer as trainer_module
from ardor.train import watchdog
from ardor.train.watchdog import Diverged, diverging, replay, spike

from .conftest import finish, prepare, train_config, tune_config

pytestmark = pytest.mark.sweep


def test_a_spike_is_far_above_the_last_losses_and_noise_is_not():
    chosen = random.Random(0)
    noisy = [3 - 0.01 * i + chosen.gauss(0, 0.2) for i in range(64)]
    assert spike(7.0, noisy) > 15
    assert spike(3.2, noisy) < 5
    assert spike(1.0, noisy) < 0  # better is never a spike
    assert spike(99.0, noisy[:19]) == 0.0  # too few to tell
    assert spike(2.1, [2.0] * 64) == pytest.approx(2.5)  # nothing is that steady
    outlier = [*noisy[:-1], 1e6]
    assert spike(7.0, outlier) > 15  # one spike does not hide the next


def test_divergence_is_steady_and_worse_than_guessing():
    high = [9.0] * 4
    assert diverging(9.0, high, first=5.0, vocab=100)  # ln 100 = 4.6
    assert not diverging(9.0, [2.0, *high[:3]], first=5.0, vocab=100)  # not yet
    assert not diverging(9.0, high, first=8.0, vocab=100)  # it began there
    assert not diverging(9.0, high, first=5.0, vocab=1000)
    assert not diverging(9.0, [], first=None, vocab=2)


def test_a_loss_that_jumps_stops_the_run_and_saves_rows_that_can_be_replayed(
    texts, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(watchdog, "LEAST", 3)
    config = train_config(texts, tmp_path / "run", num_train_epochs=4.0, save_steps=1)
    run = prepare(config)
    real = trainer_module.document_loss

    def jumping(decoder, batch, routings, **how):
        loss = real(decoder, batch, routings, **how)
        more = 49 * loss.nats.detach() if run.trainer.progress.step == 5 else 0
        return loss._replace(nats=loss.nats + more)

    monkeypatch.setattr(trainer_module, "document_loss", jumping)
    with pytest.raises(Diverged) as error:
        finish(run)
    file = tmp_path / "run" / "stopped-at-step-6.jsonl"
    said = str(error.value)
    assert "at step 6" in said and "robust standard deviations above the last 5" in said
    assert str(file) in said and "checkpoint-5 is whole" in said and "--max-loss-zscore 0" in said

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    given = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    assert len(rows) >= 3
    for row in rows:
        assert row["text"].strip() and row["text"].removesuffix("<|endoftext|>") in "".join(
            given[row["row"] - 1]
        )
        assert row["labels"][0] == IGNORE and row["labels"][1:] == row["input_ids"][1:]
    newest = newest_checkpoint(run.folder)
    assert newest is not None
    again = replay(load_model(newest, dtype="float32").decoder, file)
    assert again == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert f"ardor score {newest} {file} --replay" in said
    capfd.readouterr()
    assert main(["score", str(newest), str(file), "--replay", "--json"]) == 0
    documents = json.loads(capfd.readouterr().out)["documents"]
    assert [one["row"] for one in documents] == [row["row"] for row in rows]
    assert [one["now"] for one in documents] == pytest.approx(again, rel=1e-5)
    assert main(["score", str(newest), str(file), "--replay"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert len(shown) == len(rows) + 1 and f"{rows[0]['loss']:.4f}" in shown[1]

    monkeypatch.undo()
    finish(prepare(replace(config, resume=True, max_loss_zscore=0.0)))  # a setting that may change


def test_a_loss_that_is_no_number_saves_its_batch_too(texts, tmp_path, monkeypatch):
    run = prepare(train_config(texts, tmp_path / "run"))
    with torch.no_grad():
        run.trainer.parameters["norm.weight"][0] = math.nan
    with pytest.raises(Diverged, match=r"not finite at step 1; its batch is in .*step-1.jsonl"):
        finish(run)
    file = run.folder / "stopped-at-step-1.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows and all(row["loss"] is None for row in rows)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "the cat"}', r"x.jsonl, line 1: expected input_ids and labels"),
        ('{"input_ids": [1, 2], "labels": [1]}', r"x.jsonl, line 1: expected input_ids and labels"),
        ('{"input_ids": [1, 9999], "labels": [1, 2]}', r"line 1: 2 ids up to 9999, where the"),
        ("", r"x.jsonl is empty"),
    ],
)
def test_a_file_that_is_no_batch_is_told(base, tmp_path, line, said):
    file = tmp_path / "x.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        replay(load_model(base("llama")).decoder, file)


def test_replay_is_asked_of_a_file_with_no_other_flags(base, tmp_path, capfd):
    asked = ["score", str(base("llama")), str(tmp_path / "none.jsonl"), "--replay"]
    assert main(asked) == 2
    assert "no file at" in capfd.readouterr().err
    assert main([*asked, "--text"]) == 2
    assert "leave --text, --tokens and --max-length out" in capfd.readouterr().err


def test_a_learning_rate_that_diverges_is_named_after_a_few_steps(texts, tmp_path, capfd):
    config = train_config(
        texts,
        tmp_path / "run",
        learning_rate=30.0,
        warmup_ratio=0.0,
        num_train_epochs=20.0,
        max_grad_norm=0.0,
    )
    run = prepare(config)
    with pytest.raises(Diverged, match=r"learning_rate=30 is too high|is not finite"):
        finish(run)
    assert run.trainer.progress.step < 12


def test_a_rate_that_does_not_diverge_is_left_alone(texts, tmp_path):
    config = train_config(texts, tmp_path / "run", learning_rate=0.01, num_train_epochs=10.0)
    assert finish(prepare(config))[-1]["kind"] == "memory"


def test_gradients_that_are_all_zero_are_told_at_the_first_step(make, dataset):
    trainer = make()
    for parameter in trainer.parameters.values():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(ConfigError, match="all gradients are zero at step 1, so nothing would be"):
        trainer._step(*next(trainer._windows()))


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (1.0, r"step 2, and those before were not: .* learning_rate=500 is too high"),
        (0.0, r"step 2, and those before were not: the loss is exactly 0"),
    ],
)
def test_gradients_that_become_zero_are_not_put_down_to_what_is_frozen(
    make, monkeypatch, scale, said
):
    trainer = make(learning_rate=500.0, max_grad_norm=0.0)
    windows, real = trainer._windows(), trainer_module.document_loss
    trainer._step(*next(windows))

    def flat(decoder, batch, routings, **how):
        return real(decoder, batch, routings, **how)._replace(
            nats=torch.tensor(9.0 * scale, requires_grad=True)
        )

    monkeypatch.setattr(trainer_module, "document_loss", flat)
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(Diverged, match=said) as error:
        trainer._step(*next(windows))
    assert "freeze" not in str(error.value) and "stopped-at-step-2.jsonl" in str(error.value)


@pytest.mark.parametrize(("rate", "told"), [(500.0, True), (1e-2, False)])
def test_a_rate_far_above_the_usual_is_said_before_the_first_step(
    base, pairs, tmp_path, rate, told
):
    run = prepare(tune_config(base("llama"), pairs, tmp_path / "run", learning_rate=rate))
    assert any("times the usual 0.0002: expect the loss to" in n for n in run.notes) == told


def test_a_fresh_adapter_has_gradients_although_half_of_them_are_zero(base, pairs, tmp_path):
    run = prepare(tune_config(base("llama"), pairs, tmp_path / "run", max_steps=1))
    events = finish(run)
    assert not [event for event in events if event["kind"] == "note"]


def test_weights_that_no_gradient_reaches_are_named_once(make):
    trainer = make(max_steps=2)
    trainer.parameters["unused"] = torch.nn.Parameter(torch.zeros(3))
    trainer.hooks = replace(trainer.hooks, save_weights=lambda directory: None)
    notes = []
    windows = trainer._windows()
    for _ in range(2):
        trainer._step(*next(windows))
        notes.append(trainer._note)
    assert notes == ["no gradient reached unused in the first step", None]


def test_nothing_to_train_is_told_before_a_step(base, pairs, tmp_path, capfd):
    args = ["finetune", str(base("llama")), str(pairs), "-o", str(tmp_path / "run")]
    assert main([*args, "--freeze", "lora"]) == 2
    said = capfd.readouterr().err
    assert "freeze and train_only leave nothing to train" in said and "lora_A" in said
    assert not (tmp_path / "run").exists()


def test_data_smaller_than_a_batch_are_told_and_trained_on(base, tmp_path, capfd):
    data = tmp_path / "two.jsonl"
    data.write_text('{"text": "the cat sat"}\n{"text": "a dog ran"}\n')
    args = ["finetune", str(base("llama")), str(data), "-o", str(tmp_path / "run")]
    assert main([*args, "--max-steps", "2"]) == 0
    assert "small data: 2 examples, fewer than one step's batch takes" in capfd.readouterr().err
    assert main([*args[:-1], str(tmp_path / "b"), "--per-device-train-batch-size", "2"]) == 0
    assert "small data" not in capfd.readouterr().err


def test_sigterm_leaves_a_checkpoint(texts, tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    real = trainer_module.Trainer._step

    def step(self, *given):
        event = real(self, *given)
        if event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return event

    monkeypatch.setattr(trainer_module.Trainer, "_step", step)
    sizes = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
    steps = " --num-attention-heads 2 --max-length 48 --tokens-per-batch 48 --save-steps 50"
    assert main(["train", str(texts), "-o", str(run), *(sizes + steps).split()]) == 130
    said = capfd.readouterr().err
    assert "stopped at step 2 of" in said and "--resume" in said
    newest = newest_checkpoint(run)
    assert newest is not None and newest.name == "checkpoint-2"

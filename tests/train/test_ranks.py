"""Two processes give the numbers of one, and a run of two is stopped and resumed like one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ardor.cli.main import main
from ardor.errors import ConfigError
from ardor.files.runs import checkpoints, newest_checkpoint
from ardor.files.weights import read_tensors
from ardor.load import load_model
from ardor.train import finetune
from ardor.train.config import Finetune
from ardor.train.ranks import Ranks
from ardor.train.run import _agree

from ..tiny import sentences, write_rows
from .conftest import figures
from .ends import assert_only_whole_checkpoints, assert_same_end

pytestmark = pytest.mark.sweep

SIZES = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
SIZES += " --num-attention-heads 2 --max-length 48 --tokens-per-batch 48 --dtype float32"
STEPS = " --max-steps 6 --eval-fraction 0.1 --eval-steps 3 --save-steps 2"


def together(args: list[str], **struck: Any) -> subprocess.CompletedProcess[str]:
    """`ardor ARGS` in two processes; what of `struck.py` happens to one of them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(29_000 + os.getpid() % 1000)]
    launch += [str(Path(__file__).with_name("struck.py"))] if struck else ["-m", "ardor"]
    return subprocess.run(
        [*launch, *args],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STRUCK": json.dumps(struck)},
    )


def args(texts: Path, run: Path, accumulation: int = 3) -> list[str]:
    asked = f"{SIZES}{STEPS} --gradient-accumulation-steps {accumulation}"
    return ["train", str(texts), "-o", str(run), *asked.split()]


def losses(run: Path, kind: str) -> list[float]:
    return [row["loss"] for row in figures(run) if row["kind"] == kind]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(texts, tmp_path):
    assert main(args(texts, tmp_path / "one")) == 0
    done = together(args(texts, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("try it: ") == 1  # one of them talks
    assert "2 processes share each step's micro-batches" in done.stderr
    for kind in ("train", "eval"):
        one, two = (losses(tmp_path / name, kind) for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-6) and len(one) >= 2
    rows = [figures(tmp_path / name) for name in ("one", "two")]
    for key in ("targets", "tokens", "learning_rate", "step"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]
    one, two = (load_model(tmp_path / name).decoder.state_dict() for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.slow
def test_a_run_of_two_resumes_bitwise(texts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert together(args(texts, whole)).returncode == 0
    killed = args(texts, cut)
    assert together(killed).returncode == 0
    # As if it had been killed after step 4: what came later is gone.
    for path in sorted((cut / "checkpoint-6").iterdir()):
        path.unlink()
    (cut / "checkpoint-6").rmdir()
    done = together(["train", "--config", str(cut / "config.yaml"), "--resume"])
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4 of 6" in done.stderr
    last, wanted = newest_checkpoint(cut), newest_checkpoint(whole)
    assert last is not None and wanted is not None and last.name == wanted.name
    for name in ("model.safetensors", "trainer.safetensors"):
        assert (last / name).read_bytes() == (wanted / name).read_bytes(), name
    assert figures(cut) == figures(whole)
    alone = main(["train", "--config", str(cut / "config.yaml"), "--resume"])
    assert alone == 2  # random states of two processes are none of one


# --- preferences ---


@pytest.fixture(scope="module")
def judging(base, tmp_path_factory) -> Callable[..., list[str]]:
    """A run on pairs or labels; every third window has one micro-batch, none for the second."""
    columns = zip(sentences(12, 3), sentences(12, 4), sentences(12, 5), strict=True)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in columns]
    path = write_rows(tmp_path_factory.mktemp("judged") / "judged.jsonl", rows)

    def args(run: Path, objective: str, method: str) -> list[str]:
        size = {"dpo": 2, "kto": 4}[objective]  # a pair is two answers with labels
        asked = f"--objective {objective} --method {method} --dtype float32 --max-steps 7"
        asked += f" --per-device-train-batch-size {size} --gradient-accumulation-steps 2"
        asked += " --learning-rate 0.003 --eval-fraction 0.2 --save-steps 2 --max-length 48"
        asked += " --lora-r 2" * (method == "lora")
        return ["finetune", str(base("llama")), str(path), "-o", str(run), *asked.split()]

    return args


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ("kto", "lora"),
        pytest.param("kto", "full", marks=pytest.mark.slow),
        pytest.param("dpo", "lora", marks=pytest.mark.slow),
        pytest.param("dpo", "full", marks=pytest.mark.slow),
    ],
)
def test_preferences_in_two_processes_are_those_in_one(judging, tmp_path, objective, method):
    assert main(judging(tmp_path / "one", objective, method)) == 0
    done = together(judging(tmp_path / "two", objective, method))
    assert done.returncode == 0, done.stderr
    one, two = (figures(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) and [row.keys() for row in one] == [row.keys() for row in two]
    for row, other in zip(one, two, strict=True):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    # Windows are ragged, and what is compared moves.
    train = [row for row in one if "learning_rate" in row]
    tokens = [row["tokens"] for row in train]
    assert max(tokens[2::3]) < min(tokens[0::3] + tokens[1::3])
    assert abs(train[-1]["rewards/margins"]) > 1e-3
    if objective == "kto":
        assert max(row["kl"] for row in train) > 1e-3
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two = (load_tensors(tmp_path / run, name) for run in ("one", "two"))
    begun = load_tensors(tmp_path / "one", name, first=True)
    moved = max(float((one[key] - begun[key]).abs().max()) for key in one)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-3 * moved


def load_tensors(run: Path, name: str, first: bool = False) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints(run)[0 if first else -1] / name)


def test_how_far_kto_has_moved_is_measured_over_the_micro_batches_of_all(judging, tmp_path):
    """Over those of one process it is another number: the comparison above would notice."""
    _, model, data, *_ = judging(tmp_path, "kto", "full")
    config = Finetune(model=model, data=data, output=tmp_path / "run", objective="kto")
    trainer = finetune.prepare(replace(config, method="full", dtype="float32")).trainer
    batches = [trainer.plan.batch(members) for members in trainer.plan.epoch(0)[:2]]
    objective, moved = trainer.objective, []
    # As if all had become likelier, as what becomes less likely counts as 0.
    objective.reference = lambda decoder, batch: torch.full((len(batch.lengths),), -300.0)
    for share in (batches, batches[::2], batches[1::2]):
        objective.begin(trainer.decoder, share)
        moved.append(float(objective.moved))
    assert min(moved) > 0 and moved[1] != pytest.approx(moved[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "rank"), [("kill", 1), ("kill", 0), ("full disk", 0), ("interrupt", 0)]
)
def test_a_run_of_two_of_which_one_is_struck_goes_on_bitwise(judging, tmp_path, event, rank):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    objective, method = ("dpo", "full") if rank == 0 else ("kto", "lora")
    assert together(judging(whole, objective, method)).returncode == 0
    done = together(judging(cut, objective, method), event=event, rank=rank, step=3)
    assert done.returncode != 0
    assert "a bug in ardor" not in done.stderr
    if event == "interrupt":
        assert "stopped at step 4 of 7" in done.stderr
    else:
        assert "error: another process of this run has ended" in done.stderr
    assert ("error: no space left on the device" in done.stderr) == (event == "full disk")
    assert "--resume\nstarted as before, in 2 processes" in done.stderr
    assert_only_whole_checkpoints(cut)
    done = together(["finetune", "--config", str(cut / "config.yaml"), "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_end(cut, whole)


def test_processes_that_read_other_data_are_told(make, monkeypatch):
    plan = make().plan
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value + 1])
    with pytest.raises(ConfigError, match=r"process 0 has read other training data than .1."):
        _agree(Ranks(0, 2), plan)


def test_more_processes_than_micro_batches_are_refused(make):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=1 .*; give 2 or more"):
        make(ranks=Ranks(1, 2))
    assert make(ranks=Ranks(1, 2), gradient_accumulation_steps=2)


def test_every_micro_batch_is_computed_once():
    batches = list(range(7))
    shares = [i for rank in range(3) for i in Ranks(rank, 3).share(batches)]
    assert sorted(shares) == batches

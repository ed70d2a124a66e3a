"""Two processes give the numbers of one, and a run of two is stopped and resumed like one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ardor.cli.main import main
from ardor.errors import ConfigError
from ardor.files.runs import newest_checkpoint
from ardor.load import load_model
from ardor.train.ranks import Ranks

from .conftest import figures

pytestmark = pytest.mark.sweep

SIZES = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
SIZES += " --num-attention-heads 2 --max-length 48 --tokens-per-batch 48 --dtype float32"
STEPS = " --max-steps 6 --eval-fraction 0.1 --eval-steps 3 --save-steps 2"


def together(args: list[str]) -> subprocess.CompletedProcess[str]:
    """`ardor ARGS` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(29_000 + os.getpid() % 1000), "-m", "ardor"]
    return subprocess.run(
        [*launch, *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def test_more_processes_than_micro_batches_are_refused(make):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=1 .*; give 2 or more"):
        make(ranks=Ranks(1, 2))
    assert make(ranks=Ranks(1, 2), gradient_accumulation_steps=2)


def test_every_micro_batch_is_computed_once():
    batches = list(range(7))
    shares = [i for rank in range(3) for i in Ranks(rank, 3).share(batches)]
    assert sorted(shares) == batches

"""What tests of the command line share: a world of tiny files, and ways to run a command in it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ardor.cli.main import main
from ardor.files.runs import newest_checkpoint

from ..tiny import World, make_world

SIZES = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
TRAIN = f"{SIZES} --num-attention-heads 2 --max-length 48 --tokens-per-batch 96 --dtype float32"
TRAIN = TRAIN.split()
STEPS = ["--max-steps", "3", "--dtype", "float32", "--learning-rate", "0.01"]
TUNE = [*STEPS, "--lora-r", "2"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def say(capsys, monkeypatch) -> Callable[..., Said]:
    """Runs `ardor ARGS`, with lines for its standard input."""

    def run(*args: Any, stdin: str = "") -> Said:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(say) -> Callable[..., str]:
    """The one message of a command that the user has to correct."""

    def run(*args: Any, stdin: str = "") -> str:
        said = say(*args, stdin=stdin)
        assert said.code == 2, said
        assert said.out == "" and "Traceback" not in said.err
        assert said.err.count("error: ") == 1
        return said.err[said.err.index("error: ") + 7 :].strip()

    return run


def newest(run: Path) -> Path:
    found = newest_checkpoint(run)
    assert found is not None
    return found

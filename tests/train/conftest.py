"""Runs small enough to take a fraction of a second, made from text that is made here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ardor.train import pretrain
from ardor.train.config import Train
from ardor.train.run import Run

from ..tiny import SIZES, sentences, write_rows


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Models this small only lose by sharing, and lose much where the cores are shared too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """25 documents in a jsonl file."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    return write_rows(path, [{"text": text} for text in sentences(25)])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """22 questions with answers in a jsonl file."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = zip(sentences(22, 1), sentences(22, 2), strict=True)
    return write_rows(path, [{"prompt": p, "completion": c} for p, c in rows])


@pytest.fixture(scope="session")
def base(texts, tmp_path_factory) -> Callable[[str], Path]:
    """The run folder of a tiny trained base model, by family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("base") / family
            config = Train(
                data=str(texts), output=made[family], family=family, max_steps=3, **SIZES
            )
            finish(pretrain.prepare(config))
        return made[family]

    return folder


def finish(run: Run) -> list[dict]:
    """The events of a run to its end."""
    return [dict(event) for event in run.events()]

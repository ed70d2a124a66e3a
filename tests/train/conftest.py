"""Runs small enough to take a fraction of a second, made from text that is made here."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ardor.train import pretrain
from ardor.train.config import Train
from ardor.train.run import Run

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "one", "dog", "who"]
WORDS += ["ran", "far", "away", "over", "that", "hill"]

SIZES = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_length": 48,
    "dtype": "float32",
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of unequal lengths, so that batches and windows are unequal too."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(2, 12))) for _ in range(count)]


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
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(25)))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """22 questions with answers in a jsonl file."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = zip(sentences(22, 1), sentences(22, 2), strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


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

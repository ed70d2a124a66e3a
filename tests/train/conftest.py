"""Runs small enough to take a fraction of a second, made from text that is made here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ardor.data.batches import BatchPlan
from ardor.data.dataset import Dataset
from ardor.load import load_model, tokenizer_of
from ardor.train import finetune, pretrain
from ardor.train.config import Finetune, Optimisation, Train
from ardor.train.ranks import ALONE, Ranks
from ardor.train.run import Run
from ardor.train.trainer import Hooks, Trainer

from ..tiny import SIZES, sentences, write_rows
from .forked import Worker


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Models this small only lose by sharing, and lose much where the cores are shared too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def worker(tmp_path_factory) -> Iterator[Worker]:
    started = Worker(tmp_path_factory.mktemp("worker"))
    yield started
    started.close()


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


@pytest.fixture
def dataset(texts, base) -> Dataset:
    """10 documents of unequal lengths, as the tiny base model's tokenizer cuts them."""
    tokenizer = tokenizer_of(load_model(base("llama")))
    found = Dataset.from_documents(sentences(10, seed=5), tokenizer)
    assert len(set(found.lengths.tolist())) > 4
    return found


@pytest.fixture
def make(dataset, base, tmp_path) -> Callable[..., Trainer]:
    """A trainer of the tiny base model on `dataset`, in a folder of its own."""

    def trainer(hooks: Hooks | None = None, ranks: Ranks = ALONE, **settings: Any) -> Trainer:
        decoder = load_model(base("llama"), dtype="float32").decoder
        for parameter in decoder.parameters():
            parameter.data = parameter.data.clone()
        decoder.requires_grad_(True)
        config = Optimisation(**{"learning_rate": 1e-3, "warmup_ratio": 0.0, **settings})
        plan = BatchPlan(dataset, examples_per_batch=config.per_device_train_batch_size)
        hooks = hooks or Hooks(save_weights=lambda directory: None)
        return Trainer(decoder, plan, config, tmp_path / "run", hooks, ranks)

    return trainer


def train_config(texts: Path, folder: Path, **settings: Any) -> Train:
    return Train(
        **{
            "data": str(texts),
            "output": folder,
            "tokens_per_batch": 48,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2.0,
            "eval_fraction": 0.1,
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 9,
            **SIZES,
            **settings,
        }
    )


def tune_config(base: Path, pairs: Path, folder: Path, **settings: Any) -> Finetune:
    return Finetune(
        **{
            "model": str(base),
            "data": str(pairs),
            "output": folder,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2.0,
            "learning_rate": 1e-2,
            **({} if settings.get("method") == "full" else {"lora_r": 3, "lora_dropout": 0.3}),
            "eval_fraction": 0.1,
            "eval_steps": 3,
            "save_steps": 2,
            "dtype": "float32",
            "save_total_limit": 9,
            **settings,
        }
    )


def prepare(config: Train | Finetune) -> Run:
    return pretrain.prepare(config) if isinstance(config, Train) else finetune.prepare(config)


MEASURED = ("seconds", "tokens_per_second", "memory", "mfu")


def figures(run: Path) -> list[dict]:
    """Every line of metrics.jsonl without what was measured: seconds and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "memory"]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]

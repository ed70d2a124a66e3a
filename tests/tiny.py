"""Texts, and runs of a fraction of a second on them, for whoever needs a model that was trained."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "one", "dog", "who"]
WORDS += ["ran", "far", "away", "over", "that", "hill"]

SIZES: dict[str, Any] = {
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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class World:
    """A base model trained from scratch, and two adapters on it."""

    texts: Path
    pairs: Path
    base: Path  # run folders
    lora: Path
    qlora: Path


def make_base(folder: Path) -> Path:
    """The folder of a run, from scratch."""
    from ardor.train import pretrain  # later: after pytest has hooked into imports
    from ardor.train.config import Train

    texts = write_rows(folder / "texts.jsonl", [{"text": text} for text in sentences(25)])
    config = Train(data=str(texts), output=folder / "b", max_steps=3, **SIZES)
    list(pretrain.prepare(config).events())
    return folder / "b"


def copy_of(run: Path, to: Path) -> Path:
    """A copy of the newest checkpoint of a run, to be damaged."""
    from ardor.files.runs import newest_checkpoint  # later, as above

    newest = newest_checkpoint(run)
    assert newest is not None
    shutil.copytree(newest, to)
    return to


def make_world(folder: Path) -> World:
    from ardor.train import finetune  # later, as above
    from ardor.train.config import Finetune

    base = make_base(folder)
    names = ("texts.jsonl", "pairs.jsonl", base.name, "l", "q")
    world = World(*(folder / name for name in names))
    pairs = zip(sentences(22, 1), sentences(22, 2), strict=True)
    write_rows(world.pairs, [{"prompt": p, "completion": c} for p, c in pairs])
    for method, output in (("lora", world.lora), ("qlora", world.qlora)):
        config = Finetune(
            model=str(world.base),
            data=str(world.pairs),
            output=output,
            method=method,
            chat_template="chatml",
            max_steps=3,
            learning_rate=1e-2,
            lora_r=2,
            dtype="float32",
        )
        list(finetune.prepare(config).events())
    return world

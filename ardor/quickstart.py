"""The whole main job on text that every machine has: corpus, base model, QLoRA, chat.

Each stage calls what the verbs call, with the settings shown here, and leaves files that the verbs
can use. Nothing is downloaded.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.data.stdlib import Pair, split_by_module, stdlib_documents, stdlib_pairs
from ardor.errors import ConfigError
from ardor.files.atomic import write_atomic
from ardor.train import finetune, pretrain
from ardor.train.config import Finetune, Train
from ardor.train.run import Run

HELDOUT_FRACTION = 0.1
QUESTIONS = 3


@dataclass(frozen=True)
class Data:
    """Files made from the standard library, and what is in them."""

    corpus: Path
    train: Path
    heldout: Path
    documents: int
    characters: int
    pairs: int
    held_out: tuple[Pair, ...]


def make_data(folder: Path, seed: int) -> Data:
    """Write the corpus and the question-answer pairs of this interpreter's standard library.

    Modules whose questions are held out are in neither the corpus nor the training pairs.

    Raises: DataError if the library has no sources.
    """
    trained, held_out = split_by_module(stdlib_pairs(), HELDOUT_FRACTION, seed)
    documents = list(stdlib_documents(exclude_modules={pair.module for pair in held_out}))
    data = Data(
        corpus=folder / "corpus.jsonl",
        train=folder / "train.jsonl",
        heldout=folder / "heldout.jsonl",
        documents=len(documents),
        characters=sum(len(document.text) for document in documents),
        pairs=len(trained),
        held_out=tuple(held_out),
    )
    _write(data.corpus, ({"text": document.text} for document in documents))
    for path, pairs in ((data.train, trained), (data.heldout, held_out)):
        _write(path, ({"messages": list(pair.messages)} for pair in pairs))
    return data


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prepare_base(folder: Path, data: Data, *, steps: int, seed: int) -> Run:
    """The run that trains a tokenizer and a small Llama from scratch, in folder/base."""
    return pretrain.prepare(
        Train(
            data=str(data.corpus),
            output=folder / "base",
            seed=seed,
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_length=512,
            tokens_per_batch=2048,
            max_steps=steps,
            learning_rate=3e-3,
            warmup_ratio=0.05,
            min_lr_ratio=0.05,
            eval_steps=max(1, steps // 4),
            save_steps=steps,
            sample_prompts=("Return the",),
        )
    )


def prepare_tuning(folder: Path, data: Data, *, epochs: float, seed: int) -> Run:
    """The run that loads the base as NF4 and trains LoRA adapters on the pairs, in `folder`."""
    return finetune.prepare(
        Finetune(
            model=str(folder / "base"),
            data=str(data.train),
            eval_data=str(data.heldout),
            output=folder,
            method="qlora",
            seed=seed,
            lora_r=16,
            lora_alpha=32.0,
            learning_rate=3e-3,
            num_train_epochs=epochs,
            tokens_per_batch=2048,
            max_length=512,
            warmup_ratio=0.05,
            stop_rate_samples=64,
            eval_steps=10**9,  # before and after
        )
    )


def check_folder(folder: Path) -> None:
    """Raises: ConfigError if the folder is in use."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder with -o")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} already exists; look at it with `ardor chat {folder}`, delete it, "
            "or choose another with -o"
        )


def questions(data: Data) -> list[Pair]:
    """Held-out questions to chat about, spread over the modules."""
    step = max(1, len(data.held_out) // QUESTIONS)
    return list(data.held_out[::step][:QUESTIONS])

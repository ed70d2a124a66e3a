"""`ardor.train` and `ardor.finetune`: what the verbs do, from Python.

Settings are those of the command line, as keyword arguments. `train` and `finetune` go to the end
and say how far they are; `train_run` and `finetune_run` give the run, whose events one draws:

>>> run = ardor.finetune_run("model", "data.jsonl", method="lora", max_steps=100)
>>> for event in run.events():
...     if event["kind"] == "eval" and event["loss"] < 1.0:
...         run.trainer.stop_requested = True  # ends after this step, with a checkpoint
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ardor.errors import CheckpointError, ConfigError
from ardor.files.runs import chosen_checkpoint
from ardor.lm import LM, load
from ardor.train import finetune as finetuning
from ardor.train import pretrain as pretraining
from ardor.train.config import Finetune, Train
from ardor.train.run import Run
from ardor.train.trainer import Event

INTERVAL = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Trained:
    """What a run has come to."""

    folder: Path
    checkpoint: Path  # that stands for the run: the best where it was asked for, else the last
    steps: int
    evaluations: tuple[Event, ...]  # of held-out data, in order
    stopped_early: bool

    def load(self, **settings: Any) -> LM:
        """The model, as `ardor.load` loads it."""
        return load(str(self.folder), **settings)


def train(data: Any, *, progress: bool = True, **settings: Any) -> Trained:
    """Train a language model from scratch on text, to the end.

    `settings` are those of `ardor train`, as are the errors.
    """
    return _to_the_end(train_run(data, **settings), progress)


def finetune(model: str | Path, data: Any, *, progress: bool = True, **settings: Any) -> Trained:
    """Fine-tune a model on data, to the end.

    `settings` are those of `ardor finetune`, as are the errors.
    """
    return _to_the_end(finetune_run(model, data, **settings), progress)


def train_run(data: Any, **settings: Any) -> Run:
    """A run from scratch that is ready to go: iterate its `events()`."""
    return pretraining.prepare(_config(Train, {"data": data, **settings}))


def finetune_run(model: str | Path, data: Any, **settings: Any) -> Run:
    """A fine-tuning that is ready to go: iterate its `events()`."""
    return finetuning.prepare(_config(Finetune, {"model": str(model), "data": data, **settings}))


def _config(kind: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """The dataclass of the verb; what Python takes beside it: paths as str, lists as tuples.

    Raises: ConfigError for a setting that there is none of, with the nearest.
    """
    from difflib import get_close_matches

    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in settings.keys() - known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown setting {name!r}{hint}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    if isinstance(values.get("output"), str):
        values["output"] = Path(values["output"])
    if isinstance(values["data"], Path):
        values["data"] = str(values["data"])
    return kind(**values)


def _to_the_end(run: Run, progress: bool) -> Trained:
    say = _Lines(run) if progress and run.trainer.ranks.first else None
    evaluations: list[Event] = []
    for event in run.events():
        if event["kind"] == "eval":
            evaluations.append(event)
        if say is not None:
            say(event)
    checkpoint = chosen_checkpoint(run.folder)
    if checkpoint is None:
        raise CheckpointError(f"{run.folder} has no checkpoint: the run was stopped before a step")
    steps, early = run.trainer.progress.step, run.trainer.stopped_early
    return Trained(run.folder, checkpoint, steps, tuple(evaluations), early)


class _Lines:
    """Progress on stderr, a line now and then: what suits scripts and notebooks alike."""

    def __init__(self, run: Run):
        self._steps, self._printed = run.trainer.steps, 0.0
        for note in (*run.notes, f"run: {run.folder}"):
            print(note, file=sys.stderr)

    def __call__(self, event: Event) -> None:
        step, kind = event["step"], event["kind"]
        if kind == "train":
            now = time.monotonic()
            if now - self._printed < INTERVAL and step < self._steps:
                return
            self._printed = now
            text = f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
        elif kind == "eval":
            text = f"held-out loss {event['loss']:.3f} nats"
        elif kind == "sample":
            text = f"sample: {event['prompt']}{event['text']}"
        elif kind == "note":
            text = event["text"]
        else:
            return
        print(f"step {step}/{self._steps}: {text}", file=sys.stderr)

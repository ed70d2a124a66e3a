"""checkpoint-N/: the weights in the form other tools read, and the trainer's state beside them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ardor.errors import CheckpointError
from ardor.files.atomic import atomic_directory
from ardor.files.json import read_object, write_json
from ardor.files.runs import checkpoints
from ardor.files.weights import read_tensors, write_tensors
from ardor.train.config import Optimisation

Config = TypeVar("Config", bound=Optimisation)

# Settings whose default depends on the day, or on what the model was before the first step.
CHOSEN = ("template_date", "precompute_ref_log_probs")
TENSORS, STATE = "trainer.safetensors", "trainer.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: after `step` optimizer steps, before micro-batch `index` of `epoch`."""

    step: int
    epoch: int
    index: int
    seen_tokens: int
    seen_targets: int
    metrics_bytes: int  # length of metrics.jsonl; what was written after it is written again
    dataset: str  # fingerprint of the training data
    settings: dict[str, Any]  # those that change the result
    recent: tuple[float, ...] = ()  # losses of the last steps, for the watchdog
    first_loss: float | None = None
    best_step: int | None = None  # of the lowest held-out loss so far
    best_loss: float | None = None
    misses: int = 0  # evaluations since then that were not better


def write_checkpoint(
    run: Path,
    progress: Progress,
    tensors: dict[str, Tensor],
    save_weights: Callable[[Path], None],
    *,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write run/checkpoint-<step> whole or not at all, then drop all but the newest `keep`.

    An older checkpoint is dropped only once the new one is in place; that of step `best` never is.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    target = run / f"checkpoint-{progress.step}"
    with atomic_directory(target) as partial:
        save_weights(partial)
        write_tensors(partial / TENSORS, tensors)
        write_json(partial / STATE, asdict(progress))
    for old in checkpoints(run)[: -max(1, keep)]:
        if old.name != f"checkpoint-{best}":
            _remove(old)
    return target


def read_checkpoint(directory: Path) -> tuple[Progress, dict[str, Tensor]]:
    """The trainer's state in a checkpoint.

    Raises: CheckpointError if it is missing or damaged.
    """
    if not (directory / STATE).exists():
        raise CheckpointError(
            f"{directory} holds weights but no {STATE}, so training cannot resume from it; "
            "fine-tune it as a model instead"
        )
    with _damaged(directory):
        found = read_object(directory / STATE)
        found["recent"] = tuple(found.get("recent", ()))
        return Progress(**found), read_tensors(directory / TENSORS)


@contextmanager
def _damaged(directory: Path) -> Iterator[None]:
    try:
        yield
    # The last two: not the fields of a Progress.
    except (CheckpointError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{directory} is damaged: {error}; delete it to resume from the checkpoint before it"
        ) from error


def as_begun(config: Config, checkpoint: Path | None) -> Config:
    """`config` with what a run chose by itself when it began, where nothing else is asked for.

    Raises: CheckpointError if the record of the checkpoint is missing or damaged.
    """
    if checkpoint is None or not (checkpoint / STATE).exists():
        return config
    with _damaged(checkpoint):
        begun = read_object(checkpoint / STATE)["settings"]
    names = [name for name in CHOSEN if getattr(config, name, ...) is None]
    return replace(config, **{name: begun.get(name) for name in names})


def _remove(directory: Path) -> None:
    """Rename first: a kill in the middle of deleting must not leave half a checkpoint."""
    doomed = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # `clean_partials` has another try at the rest

"""checkpoint-N/: the weights in the form other tools read, and the trainer's state beside them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ardor.errors import CheckpointError
from ardor.files.atomic import atomic_directory
from ardor.files.json import read_json, write_json
from ardor.files.runs import checkpoints
from ardor.files.weights import read_tensors, write_tensors

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
    try:
        found = read_json(directory / STATE)
        found["recent"] = tuple(found.get("recent", ()))
        return Progress(**found), read_tensors(directory / TENSORS)
    except (TypeError, CheckpointError) as error:  # TypeError: not the fields of a Progress
        raise CheckpointError(
            f"{directory} is damaged: {error}; delete it to resume from the checkpoint before it"
        ) from error


def _remove(directory: Path) -> None:
    """Rename first: a kill in the middle of deleting must not leave half a checkpoint."""
    doomed = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # `clean_partials` has another try at the rest

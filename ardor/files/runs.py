"""The folder of a run: checkpoint-N/ directories, of which one stands for the run."""

import json
import re
from pathlib import Path

SETTINGS, METRICS = "config.yaml", "metrics.jsonl"  # in the folder of a run
ORIGIN = "ardor.json"  # beside an adapter: how its base was held while it was trained

BEST = "best.json"  # in the folder of a run: which checkpoint stands for it, if not the newest

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Unfinished ones have hidden names."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def chosen_checkpoint(run: Path) -> Path | None:
    """The checkpoint that stands for a run: the best where the run ended with it, else the newest.

    A run that goes on goes on from the newest.
    """
    try:
        best = run / json.loads((run / BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return newest_checkpoint(run)
    return best if best in checkpoints(run) else newest_checkpoint(run)

"""The folder of a run: checkpoint-N/ directories, of which the newest whole one counts."""

import re
from pathlib import Path

SETTINGS, METRICS = "config.yaml", "metrics.jsonl"  # in the folder of a run
ORIGIN = "ardor.json"  # beside an adapter: how its base was held while it was trained

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Unfinished ones have hidden names."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)

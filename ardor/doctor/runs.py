"""The folder of a run as it can be read afterwards: its settings, its metrics, its checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ardor.errors import ArdorError
from ardor.files.runs import METRICS, SETTINGS, checkpoints
from ardor.files.yaml import read_yaml


@dataclass
class RunFolder:
    """What is there of it; what fails is kept under `problems`, not raised."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    checkpoints: list[Path] = field(default_factory=list)  # oldest first
    problems: list[str] = field(default_factory=list)

    def series(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every event of that kind that has the key, NaN included."""
        found = []
        for event in self.events:
            value = event.get(key)
            if event.get("kind") == kind and isinstance(value, int | float):
                found.append((int(event.get("step", 0)), float(value)))
        return found


def is_run(path: Path) -> bool:
    return (path / SETTINGS).exists() or (path / METRICS).exists()


def open_run(path: Path) -> RunFolder:
    """Everything that can be read of the run in `path`."""
    found = RunFolder(path, checkpoints=checkpoints(path))
    try:
        found.settings = read_yaml(path / SETTINGS).values
    except ArdorError as error:
        found.problems.append(str(error))
    file = path / METRICS
    if not file.exists():
        found.problems.append(f"{file} does not exist")
        return found
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            found.problems.append(f"{file}:{number}: {error}")
            continue
        if isinstance(event, dict):
            found.events.append(event)
    return found

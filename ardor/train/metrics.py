"""metrics.jsonl: one line per event, appended and flushed, cut back when a run resumes."""

import json
import os
from pathlib import Path
from typing import Any

from ardor.files.atomic import explained


class Metrics:
    """The metrics file of a run. `bytes` is its length, which a checkpoint records."""

    def __init__(self, path: Path, *, keep_bytes: int = 0):
        """Open for appending after the first `keep_bytes`; later lines belong to lost steps.

        Raises: CheckpointError, as `append` does, if the disk is full or the place not writable.
        """
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, min(keep_bytes, path.stat().st_size))
        self._path = path

    @property
    def bytes(self) -> int:
        return self._path.stat().st_size

    def append(self, row: dict[str, Any]) -> None:
        with explained(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

"""metrics.jsonl: one line per event, appended and flushed, cut back when a run resumes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ardor.files.atomic import explained
from ardor.train.trackers import Log


class Metrics:
    """The metrics file of a run, whose length a checkpoint records.

    Without a path, as in all processes but the first, nothing is written.
    """

    def __init__(self, path: Path | None, *, keep_bytes: int = 0, logs: Sequence[Log] = ()):
        """Open for appending after the first `keep_bytes`; later lines belong to lost steps.

        Raises: CheckpointError, as `append` does, if the disk is full or the place not writable.
        """
        self._path, self._logs = path, logs
        if path is None:
            return
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, min(keep_bytes, path.stat().st_size))

    def settle(self) -> int:
        """Have every line on the disk, and return their bytes: a checkpoint that counts them must
        not outlive them where the power fails."""
        if self._path is None:
            return 0
        with explained(self._path), open(self._path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def append(self, row: dict[str, Any]) -> None:
        if self._path is None:
            return
        with explained(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for log in self._logs:
            log(row)

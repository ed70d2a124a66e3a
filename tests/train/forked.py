"""`ardor` in processes that can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    code: int  # negative: the signal
    said: str
    changes: tuple[str, ...]  # the path of each change of a file


class Worker:
    """`ardor` in a process of its own, again and again."""

    def __init__(self, folder: Path):
        self._log = folder / "log.txt"
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        args: list[str],
        *,
        at: int | None = None,  # from 1, a place in `changes`
        event: str = "kill",
        kill_after: float | None = None,
    ) -> Ended:
        assert self._server.stdin and self._server.stdout
        order = {"args": args, "at": at, "event": event, "kill_after": kill_after}
        order["log"] = str(self._log)
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        ended = json.loads(self._server.stdout.readline())
        return Ended(ended["code"], self._log.read_text(), tuple(ended.get("changes", ())))

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

"""Two workers in turn, A B A B, in one run: machines vary from minute to minute, ratios less so."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(".venv-peers/bin/python")


@dataclass
class Worker:
    """A process that does one round of work when told to."""

    process: subprocess.Popen[str]
    about: str

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.about} ended with code {self.process.wait()}; see above")
        return json.loads(line)


@contextmanager
def worker(python: Path | str, module: str, task: str, options: dict[str, Any]) -> Iterator[Worker]:
    command = [str(python), "-m", f"benchmarks.{module}", task, json.dumps(options)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        found = Worker(process, module)
        found.about = found.answer()["about"]
        try:
            yield found
        finally:
            process.kill()


def duel(task: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Median tokens/s of both sides over alternating rounds, and their ratio."""
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} does not exist; run `make bench-peers` first")
    with (
        worker(sys.executable, "ours", task, dict(options)) as ours,
        worker(PEERS, "transformers_peer", task, dict(options)) as peer,
    ):
        sides = {"ours": ours, "peer": peer}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, found in sides.items():
                took = found.round()
                rates[side].append(took["tokens"] / took["seconds"])
            latest = ", ".join(f"{side} {values[-1]:.1f}" for side, values in rates.items())
            print(f"round {number + 1}/{rounds}: {latest} tokens/s", file=sys.stderr)
        medians = {side: statistics.median(values) for side, values in rates.items()}
        return {
            "task": task,
            **options,
            "ours": ours.about,
            "peer": peer.about,
            "rounds": rounds,
            "ours_tokens_per_second": round(medians["ours"], 2),
            "peer_tokens_per_second": round(medians["peer"], 2),
            "ratio": round(medians["ours"] / medians["peer"], 3),
        }

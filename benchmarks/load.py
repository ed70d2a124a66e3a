"""Loading side by side: a fresh process for every measurement, ours and transformers' in turn."""

import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.checkpoint import checkpoint
from benchmarks.duel import PEERS


def load_duel(model: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Medians of both sides over alternating rounds, and ratios (theirs / ours)."""
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} does not exist; run `make bench-peers` first")
    directory = checkpoint(model, "bfloat16")
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    given = json.dumps({"directory": str(directory), **options})
    sides = {"ours": sys.executable, "transformers": str(PEERS)}
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, python in sides.items():
            command = [python, "-W", "ignore", "-m", "benchmarks.load_worker", side, given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[side].append(json.loads(done.stdout))
        latest = ", ".join(
            f"{side} {found[-1]['load_seconds']:.2f} s, first token "
            f"{found[-1]['first_token_seconds']:.2f} s, "
            f"{found[-1]['peak_bytes'] / 2**30:.2f} GiB"
            for side, found in taken.items()
        )
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    medians = {
        side: {key: statistics.median(f[key] for f in found) for key in found[0]}
        for side, found in taken.items()
    }
    final = weights * (2 if options["dtype"] == "float32" else 1)
    return {
        "task": "load",
        "model": model,
        **options,
        "rounds": rounds,
        "weights_gib": round(final / 2**30, 3),
        **{side: _shown(found, final) for side, found in medians.items()},
        **{
            f"{key}_ratio": round(medians["transformers"][key] / medians["ours"][key], 2)
            for key in ("load_seconds", "load_cpu_seconds", "first_token_seconds", "peak_bytes")
        },
    }


def _shown(found: dict[str, float], weights: int) -> dict[str, float]:
    beyond_imports = found["load_peak_bytes"] - found["imported_bytes"]
    return {
        "load_seconds": round(found["load_seconds"], 3),
        "load_cpu_seconds": round(found["load_cpu_seconds"], 3),
        "first_token_seconds": round(found["first_token_seconds"], 3),
        "peak_gib": round(found["peak_bytes"] / 2**30, 3),
        "load_peak_over_weights": round(beyond_imports / weights, 3),
    }

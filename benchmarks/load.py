"""Loading side by side: a fresh process for every measurement, ours and transformers' in turn."""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.duel import PEERS


def load_duel(model: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Medians of both sides over alternating rounds, and ratios (theirs / ours)."""
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} does not exist; run `make bench-peers` first")
    with checkpoint(model) as (directory, weights):
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


@contextmanager
def checkpoint(model: str) -> Iterator[tuple[Path, int]]:
    """Random bfloat16 weights in files, and their bytes; just written, so in the page cache."""
    import torch

    from ardor.arch.decoder import Decoder
    from ardor.families import FAMILIES
    from ardor.families.hf_config import HFConfig
    from ardor.files.weights import write_weights

    raw = shapes.MODELS[model] | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    family = FAMILIES[str(raw["model_type"])]
    spec = family.spec(HFConfig(dict(raw), path="benchmarks/shapes.py"))
    with torch.device("meta"):
        empty = {name: p.bfloat16() for name, p in Decoder(spec).named_parameters()}
    layout = list(family.rules(spec).to_disk(empty.__getitem__))
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ardor-load-") as folder:
        directory = Path(folder)
        random = (
            (name, (0.02 * torch.randn(t.shape, generator=generator)).bfloat16())
            for name, t in layout
        )
        write_weights(directory, random, layout=layout)
        (directory / "config.json").write_text(json.dumps(raw))
        yield directory, sum(math.prod(t.shape) * 2 for _, t in layout)

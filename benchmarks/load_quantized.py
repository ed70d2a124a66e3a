"""Quantized loads: a fresh process for each measurement, ours and bitsandbytes' in turn.

`python -m benchmarks.load_quantized ours|peer OPTIONS` is one such process (options as JSON).
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.duel import PEERS


def duel(rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Median seconds and peak bytes of both sides over alternating rounds, and their ratios."""
    from benchmarks.checkpoint import checkpoint  # later: a peer's Python has nothing of ours

    folder = checkpoint(options["model"], "bfloat16")
    needs = "transformers"
    if options["quantization"] != "none":
        needs += ", bitsandbytes, accelerate"
    pythons = {"ours": sys.executable, "peer": str(peer_python(needs))}
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for number in range(rounds):
        for side, python in pythons.items():
            given = json.dumps({**options, "folder": str(folder)})
            command = [python, "-m", "benchmarks.load_quantized", side, given]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[side].append(json.loads(found.stdout.splitlines()[-1]))
        latest = ", ".join(
            f"{side} {values[-1]['seconds']:.2f} s, {values[-1]['peak'] / 2**30:.2f} GiB"
            for side, values in taken.items()
        )
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    result: dict[str, Any] = {"task": "load", **options, "rounds": rounds}
    for side, values in taken.items():
        result[side] = values[-1]["about"]
        result[f"{side}_seconds"] = round(statistics.median(v["seconds"] for v in values), 3)
        peak = statistics.median(v["peak"] for v in values)
        result[f"{side}_peak_gib"] = round(peak / 2**30, 3)
        result[f"{side}_before_gib"] = round(values[-1]["before"] / 2**30, 3)
        result[f"{side}_weights_gib"] = round(values[-1]["weights"] / 2**30, 3)
    result["times_faster"] = round(result["peer_seconds"] / result["ours_seconds"], 2)
    result["share_of_peak"] = round(result["ours_peak_gib"] / result["peer_peak_gib"], 3)
    return result


def peer_python(needs: str) -> Path | str:
    """A Python that can import what the peer `needs` ("a, b")."""
    for python in (PEERS, sys.executable):
        command = [str(python), "-c", f"import {needs}"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return python
    raise SystemExit(f"no Python here has {needs}; run `make bench-peers` or `make test` first")


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its highest since it began."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def ours(folder: str, quantization: str, dtype: str) -> tuple[Any, str]:
    import ardor

    lm = ardor.load(folder, quantization=quantization, dtype=dtype)
    return lm.model.decoder, f"ardor, {lm.model.quantization or lm.model.precision.weights}"


def peer(folder: str, quantization: str, dtype: str) -> tuple[Any, str]:
    import transformers

    keys: dict[str, Any] = {}
    if quantization != "none":
        eight = quantization == "int8"
        settings = {"load_in_8bit": True} if eight else {"load_in_4bit": True}
        if not eight:
            settings |= {
                "bnb_4bit_quant_type": quantization.removesuffix("-dq"),
                "bnb_4bit_use_double_quant": quantization.endswith("-dq"),
            }
        keys["quantization_config"] = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **keys)
    return model, f"transformers {transformers.__version__}"


def main(side: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(options["threads"])
    load = {"ours": ours, "peer": peer}[side]
    if side == "ours":
        import ardor.lm  # noqa: F401 (imports are no part of loading)
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    before, began = resident("VmRSS"), time.perf_counter()
    model, about = load(options["folder"], options["quantization"], options["dtype"])
    seconds = time.perf_counter() - began
    held = [*model.parameters(), *model.buffers()]
    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
    taken = {"seconds": seconds, "peak": resident("VmHWM"), "before": before, "weights": weights}
    print(json.dumps({**taken, "about": f"{about}, torch {torch.__version__}"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

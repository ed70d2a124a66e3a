"""Cross-entropy of a head over a large vocabulary: ours in chunks, and plain on whole logits.

`python -m benchmarks.entropy ours|plain OPTIONS` is one process of it (options as JSON).
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.load_quantized import resident

ROWS, WIDTH = 2048, 1024
VOCABULARIES = (8_192, 131_072)
STEPS = 3


def duel(rounds: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Median seconds of forward and backward, and peak bytes beside weights and their gradient."""
    table = []
    for trained in (False, True):
        for vocab in VOCABULARIES:
            given = json.dumps({**options, "vocab": vocab, "trained": trained})
            taken: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
            for _ in range(rounds):
                for side, values in taken.items():
                    command = [sys.executable, "-m", "benchmarks.entropy", side, given]
                    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    values.append(json.loads(found.stdout))
            row: dict[str, Any] = {"vocab": vocab, "head": "trained" if trained else "frozen"}
            for side, values in taken.items():
                row[f"{side}_seconds"] = round(statistics.median(v["seconds"] for v in values), 3)
                peak = statistics.median(v["peak"] for v in values)
                row[f"{side}_peak_mib"] = round(peak / 2**20, 1)
            row["time"] = round(row["ours_seconds"] / row["plain_seconds"], 3)
            print(json.dumps(row), file=sys.stderr)
            table.append(row)
    return table


def main(side: str, options: dict[str, Any]) -> None:
    import torch
    import torch.nn.functional as F

    from ardor.arch.linear import LinearHead
    from ardor.loss import chunked_next_token_loss, next_token_loss
    from ardor.precision import dtype_of

    torch.set_num_threads(options["threads"])
    dtype, vocab = dtype_of(options["dtype"]), options["vocab"]
    torch.manual_seed(0)
    hidden = torch.randn(1, ROWS, WIDTH).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, WIDTH)).to(dtype)
    targets = torch.randint(0, vocab, (1, ROWS))
    weight.requires_grad_(options["trained"])

    def step() -> float:
        if side == "ours":
            loss = chunked_next_token_loss(hidden, targets, LinearHead(), (weight,))
        else:
            loss = next_token_loss(F.linear(hidden, weight), targets)
        loss.nats.backward()
        hidden.grad = weight.grad = None
        return float(loss.nats.detach())

    F.linear(hidden.detach()[:, :8], weight.detach()[:8]).sum()  # what torch makes on first use
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before, seconds, nats = resident("VmRSS"), [], 0.0
    for _ in range(STEPS):
        began = time.perf_counter()
        nats = step()
        seconds.append(time.perf_counter() - began)
    own = weight.nbytes if options["trained"] else 0  # the gradient that is asked for
    peak = resident("VmHWM") - before - own
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak, "nats": nats}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

"""500 steps of LoRA and of QLoRA, ours and PEFT's: the same base, data, order, start and rates.

`python -m benchmarks.curves peer OPTIONS` is PEFT's side of one run (options as JSON). It repeats
what our run wrote down: the adapter before its first step, the documents of each step, the rates.
"""

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.load_quantized import peer_python

SEEDS = (0, 1, 2)  # of the adapters' start, the order of the data, and which rows are held out
METHODS = ("lora", "qlora")
BASE_STEPS, STEPS, TOKENS, LENGTH = 300, 500, 1024, 256
RANK, ALPHA, RATE, BETAS, MAX_NORM = 8, 16.0, 1e-3, (0.9, 0.999), 1.0


def compare(threads: int, steps: int = STEPS) -> dict[str, Any]:
    """Held-out losses of both sides: of each seed, their means, deviations and differences."""
    import torch

    torch.set_num_threads(threads)
    python = str(peer_python("peft, bitsandbytes, accelerate"))
    result: dict[str, Any] = {"task": "curves", "steps": steps, "threads": threads, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        second = base(folder)
        for method in METHODS:
            for seed in SEEDS:
                given = {"folder": scratch, "method": method, "seed": seed, "threads": threads}
                mine = ours(folder, second, given, steps)
                command = [python, "-W", "ignore", "-m", "benchmarks.curves", "peer"]
                found = subprocess.run(
                    [*command, json.dumps(given)], stdout=subprocess.PIPE, text=True, check=True
                )
                theirs = json.loads(found.stdout.splitlines()[-1])
                run = {"method": method, "seed": seed, **_compared(mine, theirs)}
                result["peer"] = theirs["about"]
                result["runs"].append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
    for method in METHODS:
        runs = [run for run in result["runs"] if run["method"] == method]
        result[method] = {
            side: {"mean": mean(values), "sd": stdev(values)}
            for side in ("before", "ours", "peer", "difference")
            if (values := [run[side] for run in runs])
        }
    return result


def lines(result: dict[str, Any]) -> str:
    """Rows for the table of docs/BENCHMARKS.md."""
    rows = []
    for method in METHODS:
        cells = [f"{found['mean']:.4f} ± {found['sd']:.4f}" for found in result[method].values()]
        runs = [run for run in result["runs"] if run["method"] == method]
        each = ", ".join(f"{run['difference']:+.5f}" for run in runs)
        rows.append(f"| {method} | {' | '.join(cells[:3])} | {each} |")
    return "\n".join(rows)


def _compared(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    steps = [abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True)]
    return {
        "before": mine["before"],
        "before_difference": mine["before"] - theirs["before"],
        "ours": mine["after"],
        "peer": theirs["after"],
        "difference": mine["after"] - theirs["after"],
        "first_step_difference": steps[0],
        "largest_step_difference": max(steps),
    }


def base(folder: Path, steps: int = BASE_STEPS, rows: int = 600) -> Path:
    """A Llama that learns half of the standard library's sources; the other half, to tune on."""
    from ardor.save import write_files
    from ardor.train import pretrain
    from ardor.train.config import Train
    from benchmarks.adapter_inits import texts

    first, second = texts(folder, rows)
    config = Train(
        data=str(first),
        output=folder / "pretrained",
        max_steps=steps,
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_length=LENGTH,
        tokens_per_batch=2048,
        dtype="float32",
        eval_steps=steps,
    )
    run = pretrain.prepare(config)
    for _ in run.events():
        pass
    (folder / "base").mkdir()
    write_files(run.model, folder / "base")
    return second


def ours(folder: Path, data: Path, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """`ardor finetune`; what PEFT needs to repeat it goes to start/ and run.json."""
    from ardor.save import write_files
    from ardor.train import finetune
    from ardor.train.config import Finetune

    method, seed = options["method"], options["seed"]
    config = Finetune(
        model=str(folder / "base"),
        data=str(data),
        output=folder / f"{method}-{seed}",
        method=method,
        seed=seed,
        max_steps=steps,
        max_length=LENGTH,
        tokens_per_batch=TOKENS,
        lora_r=RANK,
        lora_alpha=ALPHA,
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=MAX_NORM,
        dtype="float32",
        eval_fraction=0.05,
        eval_steps=steps,
    )
    run = finetune.prepare(config)
    (folder / "start").mkdir(exist_ok=True)
    write_files(run.model, folder / "start")
    assert run.heldout is not None
    events = list(run.events())
    walked = [event for event in events if event["kind"] == "train"]
    plan = run.trainer.plan
    order = (members for epoch in range(steps) for members in plan.epoch(epoch))
    batches = [
        [list(run.train[index].tokens) for index in members] for members in islice(order, steps)
    ]
    heldout = [list(run.heldout[index].tokens) for index in range(len(run.heldout))]
    rates = [event["learning_rate"] for event in walked]
    written = {"batches": batches, "heldout": heldout, "rates": rates}
    (folder / "run.json").write_text(json.dumps(written))
    held = [event["loss"] for event in events if event["kind"] == "eval"]
    return {"before": held[0], "after": held[-1], "losses": [event["loss"] for event in walked]}


def peer(options: dict[str, Any]) -> dict[str, Any]:
    """transformers, PEFT and bitsandbytes, over padded rows of the same documents."""
    import peft
    import torch
    import transformers

    folder = Path(options["folder"])
    run = json.loads((folder / "run.json").read_text())
    keys: dict[str, Any] = {}
    if options["method"] == "qlora":
        keys["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, **keys
    )
    model = peft.PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0)

    def nats(rows: list[list[int]]) -> tuple[torch.Tensor, int]:
        longest, count = max(map(len, rows)), sum(map(len, rows)) - len(rows)
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = padded.masked_fill(mask == 0, -100)
        mean_loss = model(input_ids=padded, attention_mask=mask, labels=labels).loss
        return mean_loss * count, count

    # Never model.eval(): there is no dropout, and bitsandbytes then packs 4-bit weights anew for a
    # CPU, rounding their scales, and does not get the old ones back in training.
    model.train()

    @torch.inference_mode()
    def heldout() -> float:
        rows = run["heldout"]
        found = [nats(rows[i : i + 8]) for i in range(0, len(rows), 8)]
        return sum(float(total) for total, _ in found) / sum(count for _, count in found)

    before, losses = heldout(), []
    for rows, rate in zip(run["batches"], run["rates"], strict=True):
        total, count = nats(rows)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    about = f"PEFT {peft.__version__}, transformers {transformers.__version__}"
    return {"before": before, "after": heldout(), "losses": losses, "about": about}


def main(side: str, options: dict[str, Any]) -> None:
    import torch

    assert side == "peer"
    torch.set_num_threads(options["threads"])
    print(json.dumps(peer(options)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

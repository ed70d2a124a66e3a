"""LoRA and QLoRA steps: a fresh process for each measurement, ours and PEFT's in turn.

`python -m benchmarks.tune ours|peer OPTIONS` is one such process (options as JSON).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.checkpoint import checkpoint
from benchmarks.load_quantized import peer_python, resident

LENGTH, RANK, ALPHA, LEARNING_RATE = 512, 16, 32, 1e-4


def duel(rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Median seconds a step and peak bytes of both sides over alternating rounds, and ratios."""
    folder = str(checkpoint(options["model"], "bfloat16"))
    pythons = {"ours": sys.executable, "peer": str(peer_python("peft, bitsandbytes, accelerate"))}
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for number in range(rounds):
        for side, python in pythons.items():
            given = json.dumps({**options, "folder": folder})
            command = [python, "-W", "ignore", "-m", "benchmarks.tune", side, given]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[side].append(json.loads(found.stdout.splitlines()[-1]))
        latest = ", ".join(
            f"{side} {values[-1]['seconds']:.2f} s a step, {values[-1]['peak'] / 2**30:.2f} GiB"
            for side, values in taken.items()
        )
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    result: dict[str, Any] = {**options, "tokens": LENGTH, "rank": RANK, "rounds": rounds}
    for side, values in taken.items():
        result[side] = values[-1]["about"]
        result[f"{side}_step_seconds"] = round(statistics.median(v["seconds"] for v in values), 3)
        peak = statistics.median(v["peak"] for v in values)
        result[f"{side}_peak_gib"] = round(peak / 2**30, 3)
    result["ratio"] = round(result["peer_step_seconds"] / result["ours_step_seconds"], 2)
    result["share_of_peak"] = round(result["ours_peak_gib"] / result["peer_peak_gib"], 3)
    return result


Side = tuple[Callable[[], float], str]  # one optimizer step, which gives its loss


def ours(folder: str, task: str) -> Side:
    import torch

    from ardor.adapters.lora import ALL_LINEAR, LoraConfig, add_lora, lora_parameters
    from ardor.data.batches import Batch
    from ardor.load import load_model
    from ardor.loss import IGNORE
    from ardor.score import document_loss

    model = load_model(folder, quantization="nf4" if task == "qlora" else None)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR)
    disk = model.form.disk_linears()
    generator = torch.Generator().manual_seed(0)
    add_lora(model.decoder, config, names=lambda name: disk[name].name, generator=generator)
    parameters = lora_parameters(model.decoder)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.decoder.train()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    tokens = torch.arange(3, LENGTH + 3)[None]
    targets = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORE)], 1)
    batch = Batch(tokens, targets, (LENGTH,), (0,))

    def step() -> float:
        loss = document_loss(model.decoder, batch)
        (loss.nats / loss.targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.nats.detach() / loss.targets)

    return step, f"ardor, {task}"


def peer(folder: str, task: str) -> Side:
    import peft
    import torch
    import transformers

    keys: dict[str, Any] = {}
    if task == "qlora":
        keys["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **keys)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    tokens = torch.arange(3, LENGTH + 3)[None]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, f"PEFT {peft.__version__}, transformers {transformers.__version__}, {task}"


def around(side: str) -> AbstractContextManager[None]:
    """What a run does around its steps."""
    if side == "peer":
        return nullcontext()
    from ardor.memory.heap import freed_memory_kept

    return freed_memory_kept()


def main(side: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(options["threads"])
    step, about = {"ours": ours, "peer": peer}[side](options["folder"], options["task"])
    with around(side):
        loss = step()  # what is made once is no part of a step
        seconds = []
        for _ in range(options["steps"]):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
    taken = {"seconds": statistics.median(seconds), "peak": resident("VmHWM"), "loss": loss}
    print(json.dumps({**taken, "about": f"{about}, torch {torch.__version__}"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

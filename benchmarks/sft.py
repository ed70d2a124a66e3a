"""Full fine-tuning on rows of realistic lengths: ours and TRL's SFTTrainer, a fresh process each.

`python -m benchmarks.sft ours|trl OPTIONS` is one such process (options as JSON).
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.duel import PEERS
from benchmarks.load_quantized import resident

MEDIAN, SIGMA, LONGEST = 180, 0.8, 1024  # tokens of a row: lognormal, cut at the longest
ROWS, BATCH, LEARNING_RATE = 480, 8, 2e-5
WARMUP = 2  # steps that are not timed
# Who is measured, in which order: TRL checkpoints activations unless it is told not to.
SIDES = {"ours": None, "trl": False, "trl_default": True}


def duel(rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Median useful tokens/s of each side over alternating rounds, and ratios to ours."""
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} does not exist; run `make bench-peers` first")
    options = {**options, "folder": str(prepared(options["model"]))}
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, values in taken.items():
            values.append(measured(side, options))
        latest = ", ".join(f"{side} {rate(values[-1]):.0f}" for side, values in taken.items())
        print(f"round {number + 1}/{rounds}: {latest} useful tokens/s", file=sys.stderr)
    result: dict[str, Any] = {"task": "sft", **options, "rounds": rounds}
    for side, values in taken.items():
        result[side] = values[-1]["about"]
        result[f"{side}_tokens_per_second"] = round(statistics.median(map(rate, values)), 1)
        result[f"{side}_peak_gib"] = round(statistics.median(v["peak"] for v in values) / 2**30, 2)
        result[f"{side}_tokens"] = values[-1]["tokens"]
    for side in ("trl", "trl_default"):
        result[f"ratio_to_{side}"] = round(
            result["ours_tokens_per_second"] / result[f"{side}_tokens_per_second"], 2
        )
    return result


def agreement(threads: int) -> dict[str, Any]:
    """Losses of the same 20 steps in float32, ours and TRL's, and the largest difference."""
    options = {
        "folder": str(prepared("llama-small")),
        "mode": "padding",
        "steps": 18,  # and the warm-up
        "dtype": "float32",
        "threads": threads,
        "learning_rate": 5e-4,
    }
    found = {side: measured(side, options) for side in ("ours", "trl")}
    ours, peer = (found[side]["losses"] for side in ("ours", "trl"))
    assert found["ours"]["per_step"] == found["trl"]["per_step"], "the same tokens in each step"
    differences = [abs(one - other) for one, other in zip(ours, peer, strict=True)]
    return {
        "task": "sft-agreement",
        **options,
        **{side: values["about"] for side, values in found.items()},
        "ours_losses": ours,
        "trl_losses": peer,
        "largest_difference": max(differences),
    }


def line(result: dict[str, Any]) -> str:
    """A row for the table of docs/BENCHMARKS.md."""
    cells = [
        f"{result['model']}, {result['mode']}",
        *(f"{result[f'{side}_tokens_per_second']:.0f}" for side in SIDES),
        f"**{result['ratio_to_trl']:.2f}**",
        f"{result['ratio_to_trl_default']:.2f}",
        *(f"{result[f'{side}_peak_gib']:.2f}" for side in SIDES),
    ]
    return f"| {' | '.join(cells)} |"


def rate(taken: dict[str, Any]) -> float:
    return taken["tokens"] / taken["seconds"]


def measured(side: str, options: dict[str, Any]) -> dict[str, Any]:
    """What one process of a side found."""
    python = sys.executable if side == "ours" else str(PEERS)
    given = json.dumps({**options, "checkpointing": SIDES[side]})
    kind = "ours" if side == "ours" else "trl"
    command = [python, "-W", "ignore", "-m", "benchmarks.sft", kind, given]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{side} ended with code {found.returncode}; see above")
    return json.loads(found.stdout.splitlines()[-1])


def prepared(model: str) -> Path:
    """A folder with random weights, a tokenizer and rows of text; made once."""
    from ardor.files.atomic import atomic_directory
    from benchmarks.checkpoint import write_checkpoint

    path = Path(tempfile.gettempdir()) / f"ardor-benchmarks-sft-{model}"
    if not path.is_dir():
        with atomic_directory(path) as folder:
            write_checkpoint(folder, model, "float32")
            _write_rows(folder, shapes.MODELS[model]["vocab_size"])
    return path


def _write_rows(folder: Path, vocab: int) -> None:
    """rows.jsonl, of the standard library's text, and the tokenizer that cuts it."""
    from ardor.data.stdlib import stdlib_documents
    from ardor.text.tokenizer import Tokenizer

    texts = [document.text for document in stdlib_documents(8_000_000)]
    tokenizer = Tokenizer.train(texts, vocab_size=vocab)
    # Rows of the embedding that no token has are left out of our head, but not of transformers'.
    assert tokenizer.vocab_rows == vocab
    tokenizer.save(folder)
    ids = [token for text in texts[:600] for token in tokenizer.encode(text)]
    draw, rows, at = random.Random(0), [], 0
    while len(rows) < ROWS:
        size = min(round(draw.lognormvariate(0, SIGMA) * MEDIAN), LONGEST) - 1  # and EOS
        row = tokenizer.decode(ids[at : at + size])
        at += size
        # Decoded and encoded again it may be another number of tokens.
        if 1 < len(tokenizer.encode(row)) < LONGEST:
            rows.append(json.dumps({"text": row}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """`ardor finetune --method full` itself, timed from one step's end to the next's."""
    import torch

    from ardor.train import finetune
    from ardor.train.config import Finetune

    steps = options["steps"]
    packing = options["mode"] == "packing"
    with tempfile.TemporaryDirectory() as folder:
        config = Finetune(
            model=options["folder"],
            data=f"{options['folder']}/rows.jsonl",
            output=Path(folder),
            method="full",
            max_steps=WARMUP + steps,
            max_length=LONGEST,
            per_device_train_batch_size=BATCH,
            tokens_per_batch=BATCH * LONGEST if packing else None,
            train_sampling_strategy="random" if packing else "sequential",
            learning_rate=options.get("learning_rate", LEARNING_RATE),
            lr_scheduler_type="linear",
            warmup_ratio=0.0,
            adam_beta2=0.999,
            dtype=options["dtype"],
            eval_fraction=0.0,
            eval_on_start=False,
            save_steps=WARMUP + steps + 1,
            cache=False,
        )
        run = finetune.prepare(config)
        events = (event for event in run.trainer.events() if event["kind"] == "train")
        clock, counted, losses = [], [], []
        for event in events:
            clock.append(time.perf_counter())
            counted.append(event["tokens"])
            losses.append(event["loss"])
            if len(clock) == WARMUP + steps:
                break  # before the checkpoint
    return _found(clock, counted, losses, f"ardor, torch {torch.__version__}")


def trl(options: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer on the same rows, with what it does by default but for what is said here."""
    import datasets
    import torch
    import transformers
    import trl as their_trl  # pyrefly: ignore[missing-import]  # in the peers' environment only

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    packing, steps = options["mode"] == "packing", options["steps"]
    clock, counted, losses = [], [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.append(time.perf_counter())

    class Counted(their_trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **keys: Any) -> Any:
            # Packed rows are laid end to end without padding, so they have no mask.
            mask = inputs.get("attention_mask", inputs["input_ids"])
            real = mask.sum() if "attention_mask" in inputs else mask.numel()
            counted.append(int(real))
            loss = super().training_step(model, inputs, *rest, **keys)
            losses.append(float(loss))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        config = their_trl.SFTConfig(
            output_dir=folder,
            max_steps=WARMUP + steps,
            max_length=LONGEST,
            per_device_train_batch_size=BATCH,
            packing=packing,
            train_sampling_strategy="random" if packing else "sequential",
            learning_rate=options.get("learning_rate", LEARNING_RATE),
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            bf16=options["dtype"] == "bfloat16",
            gradient_checkpointing=options["checkpointing"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options["folder"], dtype=torch.float32, attn_implementation="sdpa"
        )
        rows = datasets.load_dataset(
            "json", data_files=f"{options['folder']}/rows.jsonl", split="train", cache_dir=folder
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(options["folder"])
        trainer = Counted(
            model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.train()
    versions = their_trl.__version__, transformers.__version__, torch.__version__
    about = "TRL {}, transformers {}, torch {}".format(*versions)
    return _found(clock, counted, losses, about)


def _found(
    clock: list[float], counted: list[int], losses: list[float], about: str
) -> dict[str, Any]:
    """The steps after the warm-up: their tokens and seconds."""
    return {
        "tokens": sum(counted[WARMUP:]),
        "seconds": clock[-1] - clock[WARMUP - 1],
        "per_step": counted,
        "losses": losses,
        "peak": resident("VmHWM"),
        "about": about,
    }


def main(side: str, options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(options["threads"])
    print(json.dumps({"ours": ours, "trl": trl}[side](options)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

"""Which beginning of an adapter learns how fast: small runs on the standard library's sources.

python -m benchmarks.adapter_inits FOLDER [STEPS]

A base of 0.9 M parameters learns the first half of the library's files for 300 steps; adapters of
rank 8 on it then learn the other half. Prints held-out losses of each beginning, of three seeds.
"""

import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from ardor.train import finetune, pretrain
from ardor.train.config import Finetune, Train

SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, object]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "qlora": {"method": "qlora"},
    "qlora loftq": {"method": "qlora", "init_lora_weights": "loftq"},
}


def texts(folder: Path, rows: int = 600) -> tuple[Path, Path]:
    """Two halves of the library, in files of 1200 characters a row."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    halves = sources[0::2][:40], sources[1::2][:40]
    paths = folder / "first.jsonl", folder / "second.jsonl"
    for path, files in zip(paths, halves, strict=True):
        whole = "\n".join(file.read_text(errors="ignore") for file in files)
        pieces = [whole[i : i + 1200] for i in range(0, len(whole), 1200)][:rows]
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return paths


def last_losses(events: object) -> list[float]:
    """The held-out losses, in order."""
    return [e["loss"] for e in events if e["kind"] == "eval"]  # type: ignore[attr-defined]


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40
    folder.mkdir(parents=True, exist_ok=True)
    first, second = texts(folder)
    base = Train(
        data=str(first),
        output=folder / "base",
        max_steps=300,
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_length=256,
        tokens_per_batch=2048,
        dtype="float32",
        eval_steps=300,
    )
    if not (folder / "base").exists():
        list(pretrain.prepare(base).events())
    plain = Finetune(
        model=str(folder / "base"),
        data=str(second),
        max_steps=steps,
        lora_r=8,
        lora_alpha=16.0,
        learning_rate=1e-3,
        max_length=256,
        tokens_per_batch=2048,
        dtype="float32",
        eval_steps=steps,
        eval_fraction=0.05,
    )
    for name, settings in WAYS.items():
        found = []
        for seed in SEEDS:
            output = folder / f"{name.replace(' ', '-')}-{seed}"
            run = finetune.prepare(replace(plain, output=output, seed=seed, **settings))  # type: ignore[arg-type]
            found.append(last_losses(run.events()))
        before, after = (tuple(zip(*found, strict=True))[i] for i in (0, -1))
        gains = [one - two for one, two in zip(before, after, strict=True)]
        ends = f"{mean(before):.4f} -> {mean(after):.4f}"
        print(f"{name:12} {ends}, gain {mean(gains):.4f} +- {stdev(gains):.4f}", flush=True)


if __name__ == "__main__":
    main()

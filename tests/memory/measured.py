"""Predicted and measured peaks side by side, each case in a process of its own.

    python -m tests.memory.measured [NAME ...]

prints the table of docs/BENCHMARKS.md. Models are random, of published shapes, written once into
/tmp. Measured is VmHWM: the most pages that the process had resident, mapped files among them.
"""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ardor.arch.decoder import Decoder
from ardor.load import Model, Native, stops_of
from ardor.memory.estimate import estimate
from ardor.memory.machine import Machine
from ardor.plan import Settings, known, use_of
from ardor.precision import Precision, dtype_of
from ardor.save import write_files
from ardor.text.tokenizer import Tokenizer
from ardor.train.blueprint import read_blueprint
from ardor.train.config import Train

FOLDER = Path(tempfile.gettempdir()) / "ardor-memory"
WORDS = [f"w{number:x}" for number in range(300)]
NEW_TOKENS = 8
VERB = """
import sys
from ardor.cli.main import main
code = main(sys.argv[1:])
from ardor.memory.machine import peak_resident
print("PEAK", peak_resident(), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape, what is done with it, and how."""

    preset: str
    stored: str
    what: str  # generate | nf4 | lora | qlora | full
    rows: int = 2
    length: int = 128
    recompute: str = "none"
    accumulation: int = 1
    sizes: dict[str, int] = field(default_factory=dict)  # that differ from the preset's

    @property
    def name(self) -> str:
        layers = self.sizes.get("num_hidden_layers")
        again = "" if self.recompute == "none" else f", {self.recompute} recomputed"
        several = "" if self.accumulation == 1 else f", {self.accumulation} micro-batches"
        about = f" ({layers} layers)" if layers else ""
        return f"{self.preset}{about}, {self.what}{again}{several}"


@dataclass(frozen=True)
class Found:
    predicted: int
    measured: int
    terms: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


_FOUR = {"num_hidden_layers": 4}
CASES = [
    Case(preset="gpt2-124m", stored="bfloat16", what="lora"),
    Case(preset="gpt2-124m", stored="float32", what="full", rows=4),
    Case(preset="pythia-160m", stored="float32", what="full"),
    Case(preset="pythia-160m", stored="bfloat16", what="qlora"),
    Case(preset="smollm2-135m", stored="bfloat16", what="generate"),
    Case(preset="smollm2-135m", stored="bfloat16", what="lora", rows=4),
    Case(preset="smollm2-135m", stored="bfloat16", what="qlora"),
    Case(preset="smollm2-135m", stored="bfloat16", what="full"),
    Case(preset="smollm2-135m", stored="bfloat16", what="full", accumulation=3),
    Case(preset="smollm2-135m", stored="bfloat16", what="lora", rows=4, recompute="layers"),
    Case(preset="llama-110m", stored="float32", what="generate"),
    Case(preset="llama-110m", stored="float32", what="full", rows=4, length=256),
    *(
        Case(preset="llama-110m", stored="float32", what="full", rows=4, length=256, recompute=what)
        for what in ("selective", "layers")
    ),
    Case(preset="qwen3-0.6b", stored="bfloat16", what="generate"),
    Case(preset="qwen3-0.6b", stored="bfloat16", what="lora"),
    Case(preset="tinyllama-1.1b", stored="bfloat16", what="generate"),
    Case(preset="tinyllama-1.1b", stored="bfloat16", what="nf4"),
    Case(preset="tinyllama-1.1b", stored="bfloat16", what="lora"),
    Case(preset="tinyllama-1.1b", stored="bfloat16", what="qlora"),
    Case(preset="gemma-2-2b", stored="bfloat16", what="generate", sizes=_FOUR),
    Case(preset="gemma-2-2b", stored="bfloat16", what="lora", sizes=_FOUR),
    Case(preset="mixtral-43m", stored="bfloat16", what="full"),
    Case(preset="granite-3.0-1b-a400m", stored="bfloat16", what="generate", sizes=_FOUR),
    Case(preset="granite-3.0-1b-a400m", stored="bfloat16", what="lora", sizes=_FOUR),
]


def measure(case: Case, work: Path) -> Found:
    """Run the verb in a fresh process; what was foretold, and what it took."""
    model = write_model(case)
    if case.what in ("generate", "nf4"):
        return _generated(case, model)
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(3, 3000)))
    run = work / "run"
    flags = ["-o", run, "--method", case.what, "--max-length", case.length, "--max-steps", 2]
    flags += ["--per-device-train-batch-size", case.rows, "--eval-fraction", 0]
    flags += ["--gradient-checkpointing", case.recompute]
    flags += ["--gradient-accumulation-steps", case.accumulation]
    _verb("finetune", model, rows, *flags)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    row = next(line for line in lines if line["kind"] == "memory")
    return Found(row["predicted_memory"], row["peak_memory"], {})


def _generated(case: Case, model: Path) -> Found:
    prompt = " ".join(WORDS[: case.length])
    tokens = len(Tokenizer.from_directory(model).encode(prompt))
    format = "nf4" if case.what == "nf4" else None
    settings = Settings(
        purpose="generate", max_length=tokens, max_new_tokens=NEW_TOKENS, quantization=format
    )
    outline = known(str(model))
    found = estimate(outline.spec, use_of(outline, settings, Machine((), 0)))
    flags = [] if format is None else ["--quantization", format]
    said = _verb("generate", model, prompt, "-n", NEW_TOKENS, "-t", 0, *flags)
    peak = int(next(line for line in said.splitlines() if line.startswith("PEAK")).split()[1])
    return Found(found.bytes, peak, {term.name: term.bytes for term in found.peak.terms})


def _verb(*args: Any) -> str:
    """What the verb says on stderr."""
    command = [sys.executable, "-c", VERB, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def texts(count: int, words: int) -> list[str]:
    chosen = random.Random(0)
    return [" ".join(chosen.choices(WORDS, k=words)) for _ in range(count)]


def write_model(case: Case) -> Path:
    """A checkpoint of the case's shape with random weights; once."""
    sizes = "".join(f"-{value}" for value in case.sizes.values())
    place = FOLDER / f"{case.preset}{sizes}-{case.stored}"
    if (place / "config.json").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    blueprint = read_blueprint(Train(data="", model=case.preset, **case.sizes))
    dtype = dtype_of(case.stored)
    tokenizer = Tokenizer.train(texts(200, 200), vocab_size=1024)
    with torch.device("meta"):
        decoder = Decoder(blueprint.spec)
    decoder.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_("norm" in name)
    config = blueprint.config_json(tokenizer.special)
    model = Model(
        decoder=decoder,
        form=Native(blueprint.family, blueprint.spec, blueprint.family.rules(blueprint.spec)),
        config=config,
        generation_config={},
        tokenizer=tokenizer,
        template=None,
        stops=stops_of(tokenizer, None, {}, config),
        precision=Precision(dtype, dtype, "as written"),
        source=str(place),
        revision=None,
    )
    write_files(model, place)
    return place


def main(wanted: list[str]) -> None:
    print("| model and use | tokens | predicted | measured | ratio |\n|---|---|---|---|---|")
    for case in CASES:
        if wanted and not any(part in case.name for part in wanted):
            continue
        with tempfile.TemporaryDirectory() as work:
            found = measure(case, Path(work))
        tokens = (
            f"{case.rows} x {case.length}" if case.what not in ("generate", "nf4") else "prompt"
        )
        sizes = " | ".join(f"{size / 2**20:,.0f} MiB" for size in (found.predicted, found.measured))
        print(f"| {case.name} | {tokens} | {sizes} | {found.ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

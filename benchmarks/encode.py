"""Data to packed batches against the tokenizers library's own batch encoding of the same texts."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("text", "chat")
BATCH = 1000  # texts that the library is given at once
SEED = 0


def corpus(folder: Path, kind: str, megabytes: int) -> Path:
    """A JSON Lines file of rows made of the standard library's own words; made once."""
    from ardor.data.stdlib import stdlib_documents

    path = folder / f"{kind}-{megabytes}.jsonl"
    if path.exists():
        return path
    draw = random.Random(SEED)
    documents = [document.text for document in stdlib_documents()]
    words = [part.strip() for text in documents for part in text.split("\n\n") if len(part) > 40]

    def some(low: int, high: int) -> str:
        count = draw.randint(low, high)
        start = draw.randrange(len(words) - count)
        return "\n\n".join(words[start : start + count])

    def row() -> dict[str, Any]:
        if kind == "text":
            return {"text": some(3, 20)}
        messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": some(1, 1)[:400]})
            messages.append({"role": "assistant", "content": some(1, 4)})
        return {"messages": messages}

    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            written += file.write(json.dumps(row(), ensure_ascii=False) + "\n")
    return path


def tokenizer_folder(folder: Path, vocab: int) -> Path:
    """A byte-level BPE trained on the same words; made once."""
    from ardor.data.stdlib import stdlib_documents
    from ardor.text.tokenizer import Tokenizer

    path = folder / f"tokenizer-{vocab}"
    if not path.exists():
        texts = (document.text for document in stdlib_documents())
        Tokenizer.train(texts, vocab_size=vocab).save(path)
    return path


def ours(data: Path, tokenizer: Path, max_length: int) -> dict[str, float]:
    """Read, encode, cut and pack `data`: everything up to a plan of batches, without a cache."""
    from ardor.data.batches import BatchPlan
    from ardor.data.cache import encode
    from ardor.data.mixture import Mixture
    from ardor.text.chat import CHATML
    from ardor.text.tokenizer import Tokenizer

    found = Tokenizer.from_directory(tokenizer)
    before = _peak()
    start = time.perf_counter()
    rows = Mixture([str(data)])
    dataset = encode(
        rows, found, CHATML, max_length=max_length, over_length="truncate_left"
    ).dataset
    plan = BatchPlan(dataset, tokens_per_batch=8 * max_length)
    batches = len(plan.epoch(0))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": dataset.census.tokens,
        "batches": batches,
        "peak_mib": _peak(),
        "grown_mib": _peak() - before,
    }


def library(data: Path, tokenizer: Path, method: str) -> dict[str, float]:
    """`encode_batch` of the same texts, already read; the ids are all that is taken of it."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [
        text
        for row in rows
        for text in ([row["text"]] if "text" in row else [m["content"] for m in row["messages"]])
    ]
    encode = getattr(backend, method)
    start = time.perf_counter()
    tokens = 0
    for at in range(0, len(texts), BATCH):
        tokens += sum(len(one.ids) for one in encode(texts[at : at + BATCH]))
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "peak_mib": _peak()}


def _peak() -> float:
    from ardor.memory.machine import peak_resident

    return (peak_resident() or 0) / 2**20


def encode_duel(kind: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Medians over alternating rounds, each side in a fresh process, and the ratio of rates.

    What counts is the bytes of the file, over the seconds that each side takes.
    """
    folder = Path(options["folder"] or Path(tempfile.gettempdir()) / "ardor-encode")
    folder.mkdir(parents=True, exist_ok=True)
    data = corpus(folder, kind, options["megabytes"])
    tokenizer = tokenizer_folder(folder, options["vocab"])
    sides = {
        "ours": ["ours", str(data), str(tokenizer), str(options["max_length"])],
        "encode_batch": ["library", str(data), str(tokenizer), "encode_batch"],
        "encode_batch_fast": ["library", str(data), str(tokenizer), "encode_batch_fast"],
    }
    took: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, arguments in sides.items():
            took[side].append(_fresh(arguments, folder))
        latest = ", ".join(f"{side} {runs[-1]['seconds']:.1f} s" for side, runs in took.items())
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    size = data.stat().st_size / 10**6
    seconds = {s: statistics.median(run["seconds"] for run in runs) for s, runs in took.items()}
    return {
        "kind": kind,
        "megabytes": round(size, 1),
        "rounds": rounds,
        "megabytes_per_second": {side: round(size / value, 2) for side, value in seconds.items()},
        "ratio_to_encode_batch": round(seconds["encode_batch"] / seconds["ours"], 3),
        "ratio_to_encode_batch_fast": round(seconds["encode_batch_fast"] / seconds["ours"], 3),
        "peak_mib": {side: round(runs[-1]["peak_mib"]) for side, runs in took.items()},
        "ours": took["ours"][-1],
    }


def _fresh(arguments: list[str], folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.encode", *arguments],
            env=os.environ | {"ARDOR_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


if __name__ == "__main__":
    side, data, tokenizer, option = sys.argv[1:]
    paths = Path(data), Path(tokenizer)
    found = ours(*paths, int(option)) if side == "ours" else library(*paths, option)
    print(json.dumps(found))

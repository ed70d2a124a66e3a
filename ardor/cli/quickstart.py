"""`ardor quickstart`."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ardor.cli.console import duration, print_json, program, remarks, results
from ardor.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ardor.data.stdlib import Pair
    from ardor.quickstart import Data


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole job, offline: text from Python's own library, a model from scratch, QLoRA, chat."""

    output: Path = Path("runs/quickstart")
    """Folder that everything goes to; the other verbs can use it."""
    steps: int = 800
    """Optimizer steps of the base model."""
    epochs: float = 3.0
    """Passes over the question-answer pairs."""
    seed: int = 0
    """Of everything."""
    json: bool = False
    """Print every event of both runs, and every answer, as a line of JSON on stdout."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.epochs < math.inf:
            raise ConfigError(
                f"steps={self.steps} must be at least 1, and epochs={self.epochs} above 0"
            )


def run(config: Config) -> int:
    from ardor import quickstart as stages  # later: help needs no torch
    from ardor.cli.watch import evaluation_line, watch

    out, began = remarks() if config.json else results(), time.monotonic()
    folder = config.output
    stages.check_folder(folder)
    out.print("1/4  text from the standard library of this Python")
    data = stages.make_data(folder / "data", config.seed)
    out.print(
        f"     {data.documents:,} documents, {data.characters / 1e6:.1f} MB of text; "
        f"{data.pairs:,} question-answer pairs, {len(data.held_out):,} more held out by module"
    )
    out.print("2/4  a tokenizer and a small Llama from scratch")
    base = stages.prepare_base(folder, data, steps=config.steps, seed=config.seed)
    watch(base, "training", json=config.json, verb="train")
    del base  # its memory is not the next run's
    out.print("3/4  QLoRA: the base again from disk in 4 bits, adapters on the pairs")
    tuning = stages.prepare_tuning(folder, data, epochs=config.epochs, seed=config.seed)
    before, *_, after = watch(tuning, "qlora", json=config.json, verb="finetune")
    out.print(f"     before: {evaluation_line(before)}")
    out.print(f"     after:  {evaluation_line(after)}")
    out.print("4/4  chat: questions about modules that were held out")
    _chat(folder, stages.questions(data), json=config.json)
    out.print(
        f"\nAll of it took {duration(time.monotonic() - began)}. Look at {folder}/report.html,"
    )
    _invite(folder, data, out)
    return 0


def _invite(folder: Path, data: "Data", out: "Console") -> None:
    """The commands to go on with."""
    out.print("and do the same with your own model and data:\n")
    ardor = program()
    out.print(f"  {ardor} chat {folder}")
    out.print(f"  {ardor} score {folder} {data.heldout}")
    out.print(f'  {ardor} generate {folder / "base"} "Return the"')
    out.print(f"  {ardor} train my_texts/ -o runs/my-base")
    out.print(f"  {ardor} finetune MODEL my_pairs.jsonl -o runs/mine --method qlora")
    out.print(f"  {ardor} chat runs/mine\n")
    out.print("MODEL is a folder or a hub id; my_pairs.jsonl looks like")
    out.print(f"{data.train}.")


def _chat(folder: Path, questions: "list[Pair]", *, json: bool) -> None:
    from ardor.lm import load

    lm, out = load(folder), results()
    for pair in questions:
        if json:
            answer = lm.chat([{"role": "user", "content": pair.question}])
            print_json({"kind": "answer", "question": pair.question, **asdict(answer)})
            continue
        out.print(f"     > {pair.question}")
        out.print("     ", end="")
        for piece in lm.stream_chat([{"role": "user", "content": pair.question}]):
            out.print(piece.text, end="")
            if piece.done is not None:
                out.print(f"  [{piece.done.stop_reason}]")

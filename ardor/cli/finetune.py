"""`ardor finetune MODEL DATA`."""

from dataclasses import dataclass
from shlex import quote

from ardor.cli.console import program, remarks
from ardor.train.config import Finetune


@dataclass(frozen=True, kw_only=True)
class Config(Finetune):
    """Fine-tune a model on your data: every weight, LoRA, or LoRA on 4-bit weights (QLoRA)."""

    json: bool = False
    """Print every event as a line of JSON on stdout."""


def run(config: Config) -> int:
    from ardor.cli.watch import evaluation_line, watch  # later: help needs no torch
    from ardor.train.finetune import prepare

    found = prepare(config)
    evaluations = watch(found, config.method, json=config.json, verb="finetune")
    if not config.json:
        console = remarks()
        if len(evaluations) > 1 and evaluations[0]["step"] == 0:
            console.print(f"before: {evaluation_line(evaluations[0])}")
            console.print(f"after:  {evaluation_line(evaluations[-1])}")
        console.print(f"try it: {program()} chat {quote(str(found.folder))}")
    return 0

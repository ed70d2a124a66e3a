"""`ardor finetune MODEL DATA`."""

from dataclasses import dataclass
from shlex import quote

from ardor.cli.console import Late, program, remarks
from ardor.train.config import Finetune


@dataclass(frozen=True, kw_only=True)
class Config(Finetune):
    """Fine-tune a model on your data: every weight, LoRA, or LoRA on 4-bit weights (QLoRA)."""

    json: bool = False
    """Print every event as a line of JSON on stdout."""


def run(config: Config) -> int:
    from ardor.cli.config import narrowed  # later: help needs no torch
    from ardor.cli.watch import evaluation_line, watch
    from ardor.train.finetune import prepare
    from ardor.train.ranks import leads

    with Late("asking the reference") as asked:
        found = prepare(narrowed(config, Finetune), asked.update if leads() else None)
    evaluations = watch(found, config.method, json=config.json, verb="finetune")
    if not config.json and leads():
        console = remarks()
        if len(evaluations) > 1 and evaluations[0]["step"] == 0:
            console.print(f"before: {evaluation_line(evaluations[0])}")
            console.print(f"after:  {evaluation_line(evaluations[-1])}")
        folder = quote(str(found.folder))
        chat, go_on = f"chat {folder}", f"generate {folder} {quote(found.opening or '')}"
        console.print(f"try it: {program()} {chat if found.opening is None else go_on}")
    return 0

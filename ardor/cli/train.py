"""`ardor train DATA`."""

from dataclasses import dataclass
from shlex import quote

from ardor.cli.console import program, remarks
from ardor.train.config import Train


@dataclass(frozen=True, kw_only=True)
class Config(Train):
    """Train a language model, and its tokenizer, from scratch on text."""

    json: bool = False
    """Print every event as a line of JSON on stdout."""


def run(config: Config) -> int:
    from ardor.cli.config import narrowed  # later: help needs no torch
    from ardor.cli.watch import watch
    from ardor.train.pretrain import prepare
    from ardor.train.ranks import leads

    found = prepare(narrowed(config, Train), tell=remarks().print if leads() else None)
    watch(found, "training", json=config.json, verb="train")
    if not config.json and leads():
        folder = quote(str(found.folder))
        remarks().print(f'try it: {program()} generate {folder} "Once upon a time"')
    return 0

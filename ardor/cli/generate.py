"""`ardor generate MODEL PROMPT`."""

import sys
from dataclasses import asdict, dataclass

from ardor.cli.console import print_json
from ardor.cli.model import ModelFlags
from ardor.errors import ConfigError
from ardor.generate.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings, ModelFlags):
    """Continue a prompt; text appears as it is written."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    json: bool = False
    """Print one JSON document: text, tokens, logprobs, stop_reason."""


def run(config: Config) -> int:
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    lm = config.load(config.model)
    settings = asdict(Settings.of(config))
    if config.json:
        found = lm.generate(prompt, **settings)
        print_json(asdict(found))
        return 0
    for piece in lm.stream(prompt, **settings):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0

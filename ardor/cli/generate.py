"""`ardor generate MODEL PROMPT`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ardor.cli.console import print_json, remarks
from ardor.cli.model import ModelFlags
from ardor.errors import ConfigError
from ardor.generate.settings import Settings

BYTES_PER_TOKEN = 4  # about: the tokenizer is not there yet


@dataclass(frozen=True, kw_only=True)
class Config(Settings, ModelFlags):
    """Continue a prompt; text appears as it is written."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    chat_template: str | None = None
    """Ask the prompt as a user's message, in this chat template: its name (such as chatml, llama3
    or qwen3) or a jinja file. `ardor chat` uses the model's own."""
    json: bool = False
    """Print one JSON document: text, tokens, logprobs, stop_reason."""


def run(config: Config) -> int:
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    _tell_memory(config, prompt)
    lm = config.load(config.model)
    settings = asdict(Settings.of(config))
    asked = [{"role": "user", "content": prompt}]
    as_chat = config.chat_template is not None
    if config.json:
        found = lm.chat(asked, **settings) if as_chat else lm.generate(prompt, **settings)
        print_json(asdict(found))
        return 0
    pieces = lm.stream_chat(asked, **settings) if as_chat else lm.stream(prompt, **settings)
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _tell_memory(config: Config, prompt: str) -> None:
    """One line on stderr with the peak to come, where one device holds the model."""
    from ardor.memory.fit import note  # later: help needs no torch
    from ardor.plan import Settings as Planned
    from ardor.plan import expected_generation

    if config.device_map is not None and not config.device_map.startswith(("cpu", "cuda")):
        return
    if Path(config.quantization or "").suffix in (".yaml", ".yml"):
        return
    short = "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None
    planned = Planned(
        purpose="generate",
        dtype=config.dtype,
        quantization=config.quantization or short,
        max_length=max(1, len(prompt.encode()) // BYTES_PER_TOKEN),
        max_new_tokens=config.max_new_tokens,
        revision=config.revision,
    )
    found = expected_generation(config.model, planned, on_cpu=config.device_map == "cpu")
    if found is not None:
        remarks().print(note(found))

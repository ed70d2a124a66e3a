"""`ardor chat MODEL`."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ardor.cli.console import print_json, remarks
from ardor.cli.model import ModelFlags
from ardor.generate.settings import Settings

HELP = "Type a message; /new starts over, /exit or Ctrl-D ends. Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class Config(Settings, ModelFlags):
    """Talk with a model or a run. Messages come from the terminal, or line by line from a pipe."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    system: str | None = None
    """A system message to begin with."""
    json: bool = False
    """Print every answer as a line of JSON: text, tokens, logprobs, stop_reason."""


def run(config: Config) -> int:
    lm = config.load(config.model)
    settings = asdict(Settings.of(config))
    start = [] if config.system is None else [{"role": "system", "content": config.system}]
    messages = list(start)
    if sys.stdin.isatty():
        remarks().print(HELP)
    for text in _messages():
        if text in ("/exit", "/quit"):
            break
        if text == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        if config.json:
            answer = lm.chat(messages, **settings)
            print_json(asdict(answer))
            messages.append({"role": "assistant", "content": answer.text})
            continue
        said = ""
        try:
            for piece in lm.stream_chat(messages, **settings):
                said += piece.text
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if piece.done is not None and not piece.done.stopped:
                    remarks().print(f" [{piece.done.stop_reason}]", end="")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": said})
    return 0


def _messages() -> Iterator[str]:
    """Lines that hold something, until the end of input."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            try:
                line = input("> ")
            except EOFError:
                sys.stdout.write("\n")
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        if line.strip():
            yield line.strip()

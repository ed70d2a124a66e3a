"""`ardor chat MODEL`."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardor.cli.console import print_json, remarks
from ardor.cli.model import ModelFlags
from ardor.errors import ConfigError
from ardor.generate.settings import Settings

if TYPE_CHECKING:
    from ardor.lm import LM

HELP = "Type a message; /new starts over, /exit or Ctrl-D ends. Ctrl-C stops an answer."
RESULT, ADAPTER = "/tool", "/adapter"


@dataclass(frozen=True, kw_only=True)
class Config(Settings, ModelFlags):
    """Talk with a model or a run. Messages come from the terminal, or line by line from a pipe."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    system: str | None = None
    """A system message to begin with."""
    tools: Path | None = None
    """A JSON file with a list of functions that the model may call, as transformers takes them. Its
    calls are shown, nothing is run: give what a call returned as /tool RESULT."""
    json: bool = False
    """Print every answer as a line of JSON: text, tokens, logprobs, stop_reason, and with --tools
    tool_calls."""


def run(config: Config) -> int:
    from ardor.text.calls import read_tools  # later: help needs no tokenizers

    tools = None if config.tools is None else read_tools(config.tools)
    talk = _Talk(config, config.load(config.model), tools)
    if sys.stdin.isatty():
        remarks().print(HELP)
        if tools:
            remarks().print(f"{RESULT} RESULT gives back what a call returned.")
        if config.adapter:
            remarks().print(f"{ADAPTER} NAME takes another adapter, {ADAPTER} alone the base.")
    for text in _messages():
        if text in ("/exit", "/quit"):
            break
        if text == "/new":
            talk.start()
        elif text.split()[0] == RESULT:
            talk.returned(text[len(RESULT) :].strip())
        elif text.split()[0] == ADAPTER and config.adapter:
            talk.use(text[len(ADAPTER) :].strip())
        else:
            talk.say({"role": "user", "content": text})
    return 0


class _Talk:
    """A conversation, and the calls of the last answer that have no result yet."""

    def __init__(self, config: Config, lm: "LM", tools: list[dict[str, Any]] | None):
        self._config, self._lm, self._tools = config, lm, tools
        self._settings = {**asdict(Settings.of(config)), "tools": tools}
        self.start()

    def start(self) -> None:
        system = self._config.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._calls: list[dict[str, Any]] = []

    def use(self, name: str) -> None:
        """Answer with another adapter from now on, or with the base; what was said stays."""
        try:
            self._lm.use_adapter(name or None)
        except ConfigError as error:
            remarks().print(str(error))

    def returned(self, result: str) -> None:
        """The result of the first call that waits; once none does, the model goes on.

        Of a call that was not recognised it is one too: the person may know better.
        """
        if self._tools is None or not result:
            why = "is for --tools FILE" if self._tools is None else "needs a RESULT after it"
            remarks().print(f"{RESULT} {why}")
            return
        message = {"role": "tool", "content": result}
        if self._calls:
            call = self._calls.pop(0)
            message |= {"name": call["function"]["name"], "tool_call_id": call["id"]}
        if self._calls:
            self._messages.append(message)
            self._ask()
        else:
            self.say(message)

    def say(self, message: dict[str, Any]) -> None:
        """Have the model answer; Ctrl-C on a terminal ends its answer."""
        self._messages.append(message)
        if self._config.json:
            answer = self._lm.chat(self._messages, **self._settings)
            self._take(answer.text)
            calls = {} if self._tools is None else {"tool_calls": self._calls}
            print_json(asdict(answer) | calls)
            return
        said = ""
        try:
            for piece in self._lm.stream_chat(self._messages, **self._settings):
                said += piece.text
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if piece.done is not None and not piece.done.stopped:
                    remarks().print(f" [{piece.done.stop_reason}]", end="")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._take(said)
        self._ask()

    def _take(self, text: str) -> None:
        """Keep the answer as the template is to write it in what follows."""
        from ardor.text.calls import read_calls  # later: as above

        made = sum(len(message.get("tool_calls", ())) for message in self._messages)
        said, self._calls = (text, []) if self._tools is None else read_calls(text, made + 1)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if self._calls:
            message["tool_calls"] = [*self._calls]
        self._messages.append(message)

    def _ask(self) -> None:
        for call in self._calls[:1]:
            more = f", and {len(self._calls) - 1} more" if self._calls[1:] else ""
            name = call["function"]["name"]
            remarks().print(f"[a call of {name}{more}; give its result: {RESULT} RESULT]")


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

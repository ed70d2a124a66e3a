"""A chat template: jinja2 in a sandbox, with everything that transformers gives it."""

import hashlib
import inspect
import json
import re
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ardor.errors import TextError
from ardor.files.json import read_text
from ardor.text.messages import Messages, checked, plain, text_of, with_arguments
from ardor.text.special import read_config, read_names
from ardor.text.tools import schema_of

TOOL_USE = "tool_use"  # the name of the template that transformers takes where tools are given

# What a template that does not like its messages can raise besides jinja2's own errors.
_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
_PROBE = "\ue000"  # a private character: no template tests for it


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which templates for language models do not want.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)


class _GenerationTag(Extension):
    """`{% generation %}`: marks answers for other trainers; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Reads(NamedTuple):
    """The forms of a value that a template can write."""

    strings: bool  # a content that is a string
    parts: bool  # a content that is a list of text parts
    arguments: type | None  # of tool calls: dict, str (of JSON), or None where either will do


class ChatTemplate:
    """A jinja2 chat template, run in a sandbox as transformers runs it.

    `tokens` are the special tokens it may write ({"bos_token": "<s>"}); `clock` is what
    `strftime_now` reads, so that a dated prompt can be made twice. `variants` are the model's other
    templates by name, of which "tool_use" is taken where tools are given.

    Raises: TextError with the line if the source is not valid jinja2.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat template",
        tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
        variants: Mapping[str, "ChatTemplate"] | None = None,
    ) -> None:
        self.source = source
        self.name = name
        self.tokens = dict(tokens or {})
        self.clock = clock
        self.variants = dict(variants or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise self._error(error.lineno, error.message or "syntax error") from error

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        *,
        name: str = "default",
        clock: Callable[[], datetime] = datetime.now,
    ) -> "ChatTemplate | None":
        """The chat template of a checkpoint, or None if it has none.

        chat_template.jinja, with additional_chat_templates/NAME.jinja, wins over
        tokenizer_config.json, which may hold one template or several with names. Of several `name`
        is taken, and the others are its `variants`.

        Raises: TextError if there are several and none has that name, or if one is not valid.
        """
        directory = Path(directory)
        tokens = read_names(directory)
        found, path = _sources(directory)
        if not found:
            return None
        if name not in found:
            raise TextError(
                f"{path} has chat templates named {', '.join(sorted(found))}, "
                f"but none named {name!r}; choose one of them"
            )
        made: dict[str, ChatTemplate] = {
            key: cls(source, name=where, tokens=tokens, clock=clock)
            for key, (source, where) in found.items()
        }
        chosen = made.pop(name)
        chosen.variants = made
        return chosen

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the source: equal for training and serving, or the prompts differ."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def dated(self) -> bool:
        """Whether it can write the day on which it is rendered."""
        return any("strftime_now" in one.source for one in (self, *self.variants.values()))

    def at(self, moment: datetime) -> "ChatTemplate":
        """The same template, at a moment that stays."""
        return ChatTemplate(
            self.source,
            name=self.name,
            tokens=self.tokens,
            clock=lambda: moment,
            variants={name: one.at(moment) for name, one in self.variants.items()},
        )

    def choose(self, tools: Any) -> "ChatTemplate":
        """The template for a conversation with these tools, or with none."""
        return self if tools is None else self.variants.get(TOOL_USE, self)

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = False,
        *,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where an answer begins.

        With `continue_final_message` it ends with the last message's content, to be gone on with.
        `tools` are JSON schemas or functions, `documents` objects; any other variable reaches the
        template as it is. Contents and arguments of tool calls are handed over in the form that the
        template reads: a string for its only part, and arguments parsed or not.

        Raises: TextError for malformed messages, or if the template refuses them (with its line).
        """
        if (chosen := self.choose(variables.get("tools"))) is not self:
            return chosen.render(
                messages,
                add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        variables = self.prepared(variables)
        messages = self.readable(checked(messages))
        if not continue_final_message:
            return self.write(messages, add_generation_prompt, variables)
        if add_generation_prompt:
            raise TextError(
                "continue_final_message goes on with an answer and add_generation_prompt begins "
                "one; give one of them"
            )
        return self.write_continued(messages, variables)

    def prepared(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Template variables as they are handed over: one clock reading, tools as JSON schemas.

        Raises: TextError for tools or documents that are none.
        """
        made: dict[str, Any] = {"strftime_now": self.clock().strftime, **variables}
        for name in ("tools", "documents"):
            if made.get(name) is None:
                continue
            if not isinstance(made[name], list | tuple):
                raise TextError(f"{name!r} is {type(made[name]).__name__}; expected a list")
            made[name] = [_described(value, name, i) for i, value in enumerate(made[name], 1)]
        return made

    def readable(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Checked messages with contents and arguments in a form that this template reads."""
        if not self._reads.parts:
            messages = [
                message | {"content": text_of(message)} if "content" in message else message
                for message in messages
            ]
        elif not self._reads.strings:
            messages = [
                message | {"content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        if (kind := self._arguments_of(messages)) is None:
            return messages
        return [with_arguments(message, kind) for message in messages]

    def write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The text of messages that are `readable` already, with `prepared` variables.

        Raises: TextError as for `render`.
        """
        given = {
            "tools": None,
            "documents": None,
            "raise_exception": _raise_exception,
            **self.tokens,
            **variables,
        }
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            )
        except _FAILURES as error:
            if any("content" not in message for message in messages):
                # Where calls stand alone; many templates read a content all the same.
                filled = [{"content": ""} | message for message in messages]
                return self.write(filled, add_generation_prompt, variables)
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
            raise self._error(lines[-1] if lines else None, str(error)) from error

    def write_continued(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """`write`, up to the end of the last message's content.

        Raises: TextError if there is no such content, or the template leaves a part of it out.
        """
        content = text_of(messages[-1]) if messages else ""
        if not content:
            raise TextError(
                "continue_final_message: the last message has no content to go on with; give it "
                "the beginning of the answer, or ask for a new answer with add_generation_prompt"
            )
        # The space shows whether the template trims what it writes.
        marked = _appended(messages[-1], f"{_PROBE} ")
        text = self.write([*messages[:-1], marked], False, variables)
        before, found, after = text.rpartition(_PROBE)
        if not found or content.strip() not in before:
            raise self._error(None, "does not write the whole content of the last message, so an "
                              "answer cannot go on from its end")  # fmt: skip
        return before if after.startswith(" ") else before.rstrip()

    @cached_property
    def words(self) -> frozenset[str]:
        """What it may look for: the names that it reads values by, and its string constants."""
        tree = self._template.environment.parse(self.source)
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(names | texts)

    @cached_property
    def _reads(self) -> _Reads:
        """Found by trying: what a template does not read it raises at, skips, or writes as Python
        would write it."""
        parts = [{"type": "text", "text": _PROBE}]
        strings = self._probe([{"role": "user", "content": _PROBE}])
        lists = self._probe([{"role": "user", "content": parts}])
        return _Reads(
            strings=strings is None or _PROBE in strings,
            parts=lists is not None and _PROBE in lists and "'text'" not in lists,
            arguments=None,
        )

    def _arguments_of(self, messages: list[dict[str, Any]]) -> type | None:
        """The form of tool calls' arguments that the template writes as JSON, where only one is."""
        if not any(message.get("tool_calls") for message in messages):
            return None
        return self._argument_form

    @cached_property
    def _argument_form(self) -> type | None:
        question = {"role": "user", "content": "x"}
        function = {"name": "f", "arguments": {"q": 1}}
        call = {"id": "call00001", "type": "function", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        parsed = self._probe([question, answer])
        written = self._probe([question, with_arguments(answer, str)])
        if written is not None and re.search(r'\\+"q', written):
            return dict  # a string would be quoted once more
        if written is not None and (parsed is None or "{'q'" in parsed):
            return str
        return None

    def _probe(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self.write(messages, False, self.prepared({}))
        except TextError:
            return None

    def _error(self, line: int | None, message: str) -> TextError:
        lines = self.source.splitlines()
        if line is None or not 0 < line <= len(lines):
            return TextError(f"{self.name}: {message}")
        said = shorten(lines[line - 1], 120)  # some templates are one line of thousands
        return TextError(f"{self.name}, line {line}: {message}; the line is {said!r}")


def _sources(directory: Path) -> tuple[dict[str, tuple[str, str]], Path]:
    """Name -> (source, where it stands) of a checkpoint's templates, and the file for errors."""
    path = directory / "chat_template.jinja"
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if path.is_file():
        files = {"default": path, **{other.stem: other for other in others}}
        return {key: (read_text(file), str(file)) for key, file in files.items()}, path
    path = directory / "tokenizer_config.json"
    where = f"chat_template in {path}"
    found = read_config(directory).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        return {key: (source, f"{where} ({key})") for key, source in found.items()}, path
    return ({} if found is None else {"default": (found, where)}), path


def _described(value: Any, name: str, number: int) -> Any:
    if name == "tools" and (inspect.isfunction(value) or inspect.ismethod(value)):
        return schema_of(value)
    where = f"entry {number} of {name!r}"
    if not isinstance(found := plain(value, where), dict):
        expected = "a JSON schema or a function" if name == "tools" else "an object"
        raise TextError(f"{where} is {type(value).__name__}; expected {expected}")
    return found


def _appended(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": content + text}
    last = content[-1] | {"text": content[-1]["text"] + text}
    return message | {"content": [*content[:-1], last]}

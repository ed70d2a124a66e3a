"""Conversations to token ids: what inference is given, and what training is given, the same way.

A template's own text is encoded with its control tokens counted; what people wrote is encoded as
content, where a spelled-out control token stays text. A training row is the ids of the prompt, then
the ids of the answer, then the stop token: ids are joined, never strings, so the row begins exactly
with what inference would be given.
"""

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
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
from ardor.text.example import EMPTY, Example
from ardor.text.special import Place, read_config, read_names
from ardor.text.tokenizer import Tokenizer

CHATML_SOURCE = (
    "{%- for message in messages -%}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

Messages = Sequence[Any]
"""Dicts with a `role` and a `content`, both str. Checked here, as they come from people's files."""

# A prompt that has opened what the answer is to go on in, such as a thought.
_OPENED = re.compile(r"(?P<tag><[A-Za-z][\w-]*>)(?P<space>\s*)$")

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


class ChatTemplate:
    """A jinja2 chat template, run in a sandbox as transformers runs it.

    `tokens` are the special tokens it may write ({"bos_token": "<s>"}); `clock` is what
    `strftime_now` reads, so that a dated prompt can be made twice.

    Raises: TextError with the line if the source is not valid jinja2.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat template",
        tokens: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self.name = name
        self.tokens = dict(tokens or {})
        self.clock = clock
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

        chat_template.jinja wins over tokenizer_config.json, which may hold one template or several
        with names, of which `name` is taken.

        Raises: TextError if there are several and none has that name, or if it is not valid.
        """
        directory = Path(directory)
        tokens = read_names(directory)
        path = directory / "chat_template.jinja"
        if path.is_file():
            return cls(read_text(path), name=str(path), tokens=tokens, clock=clock)
        path = directory / "tokenizer_config.json"
        found = read_config(directory).get("chat_template")
        if found is None:
            return None
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict):
            if name not in found:
                raise TextError(
                    f"{path} has chat templates named {', '.join(sorted(found))}, "
                    f"but none named {name!r}; choose one of them"
                )
            found = found[name]
        return cls(found, name=f"chat_template in {path}", tokens=tokens, clock=clock)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the source: equal for training and serving, or the prompts differ."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where an answer begins.

        Raises: TextError for malformed messages, or if the template refuses them (with its line).
        """
        values = {
            "tools": None,
            "documents": None,
            "raise_exception": _raise_exception,
            "strftime_now": self.clock().strftime,
            **self.tokens,
            **variables,
        }
        try:
            return self._template.render(
                messages=checked(messages), add_generation_prompt=add_generation_prompt, **values
            )
        except _FAILURES as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
            raise self._error(lines[-1] if lines else None, str(error)) from error

    def _error(self, line: int | None, message: str) -> TextError:
        lines = self.source.splitlines()
        if line is None or not 0 < line <= len(lines):
            return TextError(f"{self.name}: {message}")
        shown = shorten(lines[line - 1], 120)  # some templates are one line of thousands
        return TextError(f"{self.name}, line {line}: {message}; the line is {shown!r}")


CHATML = ChatTemplate(CHATML_SOURCE, name="ChatML")


def checked(messages: Messages) -> list[dict[str, Any]]:
    """Copies of the messages, without the keys whose value is None.

    Raises: TextError that names the first message that is not a dict with str `role` and `content`.
    """
    copies = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise TextError(
                f"{where} is {type(message).__name__}; expected an object with 'role' and 'content'"
            )
        for key in ("role", "content"):
            if key not in message:
                keys = ", ".join(map(str, message)) or "nothing"
                raise TextError(f"{where} has no {key!r} (it has {keys}); add it")
            if not isinstance(message[key], str):
                found = type(message[key]).__name__
                raise TextError(f"{where}: {key!r} is {found}; expected a string")
        copies.append({key: value for key, value in message.items() if value is not None})
    return copies


def prompt_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, **variables: Any
) -> list[int]:
    """What a model is given to answer the conversation: ids up to where its answer begins.

    Control tokens count in the template's text only; BOS is there if the template writes it. Equal
    to transformers' `apply_chat_template` ids unless a content spells a control token, or an
    earlier answer would have merged with the text before it.

    Raises: TextError for malformed or refused messages, and for control tokens where they cannot be
    kept as text: in a role, a further field, or a content that the template rewrites.
    """
    if not messages:
        raise TextError("there are no messages; give at least one")
    return _Encoder(tokenizer, template, variables).prompt(checked(messages))[1]


def terminator(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The control token that the template writes right after an answer, or None.

    None also for a template that refuses a plain question and answer.
    """
    return _turn(tokenizer, template).stop


def supervise(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    stop_id: int | None = None,
    **variables: Any,
) -> list[Example]:
    """Training rows of a conversation: every answer and the stop token after it, nothing else.

    Before each answer stand exactly the `prompt_ids` of that turn. Turns share a row while the
    template lets them; where it writes the past differently from what was said (Qwen3 drops
    thoughts), the turn gets a row of its own. What the template writes between the prompt and the
    answer, or between the answer and its terminator, is trained on with it, since the model has to
    write it: a space in Llama 2, an empty thought in Qwen3. `stop_id` defaults to the template's
    terminator, then to EOS.

    Raises: TextError if there is nothing to train on, no stop token, or as for `prompt_ids`.
    """
    messages = checked(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(messages[i]["content"] for i in answers):
        what = "every assistant message is empty" if answers else "there is no assistant message"
        raise TextError(f"nothing to train on: {what}; drop the conversation or mend it")
    ends = (stop_id, terminator(tokenizer, template), tokenizer.special.eos)
    stop = next((id for id in ends if id is not None), None)
    if stop is None:
        raise TextError(
            f"{template.name} writes no control token after an answer and the tokenizer has no EOS "
            "token, so a model could not learn where to stop; give stop_id, or set eos_token in "
            "tokenizer_config.json"
        )
    encoder = _Encoder(tokenizer, template, variables)
    rows: list[Example] = []
    for i in answers:
        text, prompt = encoder.prompt(messages[:i])
        answer = encoder.answer(messages[: i + 1], text, stop)
        if stop in answer:
            raise TextError(
                f"message {i + 1} of {len(messages)} holds the stop token "
                f"{tokenizer.token(stop)!r} inside its answer; remove it from the content"
            )
        shared = len(rows[-1].tokens) if rows else 0
        if rows and tuple(prompt[:shared]) == rows[-1].tokens:
            row = rows.pop().then(prompt[shared:], supervised=False)
        else:
            row = EMPTY.then(prompt, supervised=False)
        rows.append(row.then([*answer, stop], supervised=True))
    return rows


class _Piece(NamedTuple):
    text: str
    message: int | None  # whose content this is; None for the template's own text


class _Turn(NamedTuple):
    glue: str = ""  # plain text of the template that comes after the prompt, next to the answer
    stop: int | None = None


class _Encoder:
    """The renderings of one conversation: with the same variables and clock reading for each."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, variables: dict[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.variables = _frozen(tokenizer, template, variables)
        self.glue = _turn(tokenizer, template).glue
        # Each turn of a conversation repeats those before it.
        self.encode = cache(
            lambda text, tags, place: tokenizer.encode_content(text, tags=tags, place=place)
        )

    def prompt(self, messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """The text and the ids that the model is given to go on from `messages`."""
        text = self.template.render(messages, True, **self.variables)
        return text, self.join(self.pieces(messages, text, True), messages, "start")

    def answer(self, messages: list[dict[str, Any]], prompt: str, stop: int) -> list[int]:
        """The ids that the model should write after `prompt` to give the last of `messages`."""
        number = len(messages) - 1
        text = self.template.render(messages, **self.variables)
        pieces = self.pieces(messages, text, False)
        tail = _after(pieces, len(prompt)) if text.startswith(prompt) else None
        at = max((i for i, piece in enumerate(pieces) if piece.message == number), default=None)
        content, trail = messages[number]["content"], ""
        if at is not None:
            content = pieces[at].text
            space, end = _ending(self.tokenizer, pieces[at + 1].text)
            trail = space if end == stop else ""
        if tail is not None and at is not None:
            lead = [piece for piece in tail[:at] if piece.text]
            return self.join([*lead, tail[at], _Piece(trail, None)], messages, "middle")
        if tail is not None and stop in (ids := self.join(tail, messages, "middle")):
            return ids[: ids.index(stop)]
        if (opened := _OPENED.search(prompt)) and content.startswith(opened["tag"]):
            content = content.removeprefix(opened["tag"]).removeprefix(opened["space"])
        return self.join([_Piece(content, number), _Piece(trail, None)], messages, "middle")

    def pieces(
        self, messages: list[dict[str, Any]], text: str, add_generation_prompt: bool
    ) -> list[_Piece]:
        """`text` cut so that every content that spells a control token is a piece of its own.

        All contents are, unless the template reads or rewrites one of them.

        Raises: TextError if a control token is spelled where it cannot be told from a real one.
        """
        _refuse_control(self.tokenizer, messages, self.variables)
        frame = (self.template, messages, text, add_generation_prompt, self.variables)
        if (found := _pieces(*frame, set(range(len(messages))))) is not None:
            return found
        spelled = {
            number: token
            for number, message in enumerate(messages)
            for tags in [message["role"] == "assistant"]
            if (token := self.tokenizer.control_in(message["content"], tags=tags)) is not None
        }
        if (found := _pieces(*frame, set(spelled))) is not None:
            return found
        number, token = next(iter(spelled.items()))
        raise TextError(
            f"message {number + 1} of {len(messages)} spells the control token {token!r}, and "
            f"{self.template.name} rewrites contents, so it cannot be kept as text; remove it"
        )

    def join(self, pieces: list[_Piece], messages: list[dict[str, Any]], place: Place) -> list[int]:
        """The ids of `pieces`: plain text is encoded in runs between control tokens, as if typed.

        A run is cut where an answer begins: a model that answers starts with a new token there.
        """
        answers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
        ids: list[int] = []
        run, tags = "", False

        def cut(next_place: Place, next_tags: bool = False) -> None:
            nonlocal run, place, tags
            ids.extend(self.encode(run, tags, place))
            run, place, tags = "", next_place, next_tags

        for piece in _with_glue(pieces, answers, self.glue):
            if piece.message is not None:
                if piece.message in answers or tags:
                    cut("middle", piece.message in answers)
                run += piece.text
                continue
            for part in self.tokenizer.split(piece.text):
                if isinstance(part, int):
                    cut("segment")
                    ids.append(part)
                else:
                    run += part
        cut("middle")
        return ids


def _pieces(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    text: str,
    add_generation_prompt: bool,
    variables: dict[str, Any],
    chosen: set[int],
) -> list[_Piece] | None:
    """`text`, the rendering of `messages`, cut around the contents of the `chosen` ones.

    The cuts are found by rendering again with a marker for each of these. None if the contents, as
    they are or without the white space around them, do not fill the markers' places to give `text`.
    """
    if not chosen:
        return [_Piece(text, None)]
    taken = "".join([text, template.source, *(message["content"] for message in messages)])
    mark = next((chr(c) for c in range(0xE000, 0xF900) if chr(c) not in taken), None)
    if mark is None:
        return None
    marked = [
        message | {"content": f"{mark}{i}{mark}"} if i in chosen else message
        for i, message in enumerate(messages)
    ]
    try:
        skeleton = template.render(marked, add_generation_prompt, **variables)
    except TextError:  # the template reads the contents
        return None
    first, *rest = re.split(f"{mark}([0-9]+){mark}", skeleton)
    if not text.startswith(first):
        return None
    pieces, at = [_Piece(first, None)], len(first)
    for number, literal in zip(rest[::2], rest[1::2], strict=True):
        content = messages[int(number)]["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        fits = (form for form in forms if text.startswith(form + literal, at))
        if (form := next(fits, None)) is None:
            return None
        pieces += [_Piece(form, int(number)), _Piece(literal, None)]
        at += len(form) + len(literal)
    return pieces if at == len(text) else None


def _after(pieces: list[_Piece], length: int) -> list[_Piece]:
    """The pieces of the text that is left when the first `length` characters are gone."""
    left = []
    for text, message in pieces:
        left.append(_Piece(text[length:], message))
        length = max(0, length - len(text))
    return left


def _with_glue(pieces: list[_Piece], answers: set[int], glue: str) -> list[_Piece]:
    """The same text, with the glue before an answer counted as the answer's."""
    moved = list(pieces)
    for i, piece in enumerate(pieces[1:]):
        before = pieces[i].text
        if glue and piece.message in answers and before.endswith(glue):
            moved[i] = _Piece(before.removesuffix(glue), pieces[i].message)
            moved[i + 1] = _Piece(glue + piece.text, piece.message)
    return moved


@lru_cache(maxsize=8)
def _turn(tokenizer: Tokenizer, template: ChatTemplate) -> _Turn:
    """How the template frames an answer, read off a small conversation."""
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    variables = _frozen(tokenizer, template, {})

    def literals(*messages: dict[str, Any]) -> list[str]:
        text = template.render(messages, **variables)
        pieces = _pieces(template, [*messages], text, False, variables, {0, 1, 2}) or []
        return [piece.text for piece in pieces if piece.message is None]

    try:
        prompt = template.render([question], True, **variables)
        once = literals(question, answer)
    except TextError:
        return _Turn()
    if len(once) != 3:
        return _Turn()
    before = once[0] + question["content"] + once[1]
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    *_, glue = ("", *tokenizer.split(lead))
    glue = glue if isinstance(glue, str) else ""
    _, stop = _ending(tokenizer, once[2])
    if stop is None:
        # Some write it only between turns. There the token that opens the next turn follows too.
        try:
            twice = literals(question, answer, question)
        except TextError:
            return _Turn(glue)
        opening = {part for part in tokenizer.split(once[0]) if isinstance(part, int)}
        _, stop = _ending(tokenizer, twice[2]) if len(twice) == 4 else ("", None)
        if stop in opening:
            return _Turn(glue)
    return _Turn(glue, stop)


def _ending(tokenizer: Tokenizer, text: str) -> tuple[str, int | None]:
    """The white space and the control token that `text` begins with, or ("", None)."""
    match tokenizer.split(text):
        case [int(stop), *_]:
            return "", stop
        case [str(space), int(stop), *_] if space.isspace():
            return space, stop
    return "", None


def _frozen(
    tokenizer: Tokenizer, template: ChatTemplate, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Template variables for several renderings that must agree: one clock reading for all."""
    return {**tokenizer.names, "strftime_now": template.clock().strftime, **variables}


def _refuse_control(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    fields = [
        (f"{key!r} of message {number}", value, key != "role" and message["role"] == "assistant")
        for number, message in enumerate(messages, 1)
        for key, value in message.items()
        if key != "content"
    ]
    fields += [
        (f"the template variable {key!r}", value, False)
        for key, value in variables.items()
        if key not in tokenizer.names
    ]
    for where, value, tags in fields:
        for text in _strings(value):
            if (token := tokenizer.control_in(text, tags=tags)) is not None:
                raise TextError(
                    f"{where} spells the control token {token!r}, which the template would write "
                    "as that token; remove it"
                )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)

"""What the columns of a row mean: the known dataset formats, and the examples they make."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ardor.data.sources import Row
from ardor.errors import DataError, TextError
from ardor.text.chat import ChatTemplate, TrainOn, checked, supervise
from ardor.text.example import Example, completion, document
from ardor.text.messages import text_of
from ardor.text.tokenizer import Tokenizer

Values = Mapping[str, Any]

# ShareGPT's names for who speaks, and the ones that chat templates know.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Text:
    """A document; every token is trained on."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A text and how it goes on; only the second part is trained on. No template is used."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template; assistant turns after the first `given` are trained on."""

    messages: tuple[Any, ...]  # as they are in the file, not checked yet
    given: int = 0


@dataclass(frozen=True, slots=True)
class Format:
    """One way to name columns. `read` raises DataError for values of the wrong kind."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Values], Text | Completion | Conversation]
    optional: tuple[str, ...] = ()

    def unread(self, values: Values) -> tuple[str, ...]:
        """The columns that this format does not look at."""
        return tuple(name for name in values if name not in self.columns + self.optional)


def recognise(values: Values, where: str = "the row") -> Format:
    """The first of FORMATS whose required columns are all there; other columns may be too.

    Raises: DataError with the columns found, the formats known and the nearest of them.
    """
    for format in FORMATS:
        if all(column in values for column in format.columns):
            return format
    known = "; ".join(" + ".join(format.columns) for format in FORMATS)
    raise DataError(
        f"{where} is in no known format: found the columns {', '.join(values) or '(none)'}; known "
        f"formats are {known}{_nearest(values)}"
    )


def examples_of(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn = "all"
) -> list[Example]:
    """The token sequences of a row, usually one, each ending with a stop token that is trained on.

    Messages, ShareGPT, question/answer and instruction rows become conversations and need a chat
    template. A prompt and a completion are messages if they are lists of messages, and are joined
    as they are, without any template, if they are strings. In a prompt nothing is trained on; of a
    conversation's answers, `train_on` and the messages' own flags say which are.
    A row with no answer, or with blank ones only, gives no example.

    Raises: DataError naming the row.
    """
    format = recognise(row.values, row.where)
    try:
        content = format.read(row.values)
        if isinstance(content, Text):
            return [document(tokenizer, content.text)] if content.text.strip() else []
        if isinstance(content, Completion):
            if not content.completion.strip():
                return []
            return [completion(tokenizer, content.prompt, content.completion)]
        return _conversation(content, tokenizer, template, train_on)
    except (DataError, TextError) as error:
        raise DataError(f"{row.where} ({format.name}): {error}") from error


def _conversation(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn,
) -> list[Example]:
    if template is None:
        raise DataError(
            "a conversation needs a chat template and this model has none; choose one with "
            "chat_template=chatml, or use the columns prompt and completion"
        )
    messages, given = checked(conversation.messages), conversation.given
    answers = [message for message in messages[given:] if _role(message) == "assistant"]
    if not any(text_of(answer).strip() or answer.get("tool_calls") for answer in answers):
        return []
    return supervise(tokenizer, template, messages, train_on=train_on, given=given)


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


# ---- reading values ----


def _string(values: Values, column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {_kind(value)}, expected a string")
    return value


def _optional_string(values: Values, column: str) -> str:
    return "" if values.get(column) is None else _string(values, column)


def _messages(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"column {column!r} holds {_kind(value)}, expected a list of messages")
    return list(value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | list | tuple) and not value:
        return f"an empty {type(value).__name__}"
    return f"{type(value).__name__} {value!r:.40}"


def _with_system(values: Values, messages: list[Any]) -> Conversation:
    system = _optional_string(values, "system")
    if system and _role(messages[0]) != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(tuple(messages))


def _read_messages(values: Values) -> Conversation:
    return _with_system(values, _messages(values["messages"], "messages"))


def _read_sharegpt(values: Values) -> Conversation:
    turns = _messages(values["conversations"], "conversations")
    if _role(turns[0]) is not None:  # this column's name with the keys of messages
        return _with_system(values, turns)
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            found = ", ".join(turn) if isinstance(turn, Mapping) else _kind(turn)
            raise DataError(f"turn {number} holds {found}; expected 'from' and 'value'")
        if turn["from"] not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            raise DataError(f"turn {number} is from {turn['from']!r}; known are {known}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return _with_system(values, messages)


def _read_prompt(values: Values) -> Completion | Conversation:
    prompt, answer = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(prompt, answer)
    if isinstance(prompt, str) or isinstance(answer, str):
        raise DataError(
            f"prompt holds {_kind(prompt)} and completion {_kind(answer)}; expected two strings or "
            "two lists of messages"
        )
    given = _messages(prompt, "prompt")
    return Conversation((*given, *_messages(answer, "completion")), len(given))


def _answer(question: str, answer: str, system: str = "") -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": answer})
    return Conversation(tuple(messages))


def _instruction(context: str, answer: str) -> Callable[[Values], Conversation]:
    def read(values: Values) -> Conversation:
        instruction, extra = _string(values, "instruction"), _optional_string(values, context)
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return _answer(question, _string(values, answer), _optional_string(values, "system"))

    return read


def _read_question(values: Values) -> Conversation:
    system = _optional_string(values, "system")
    return _answer(_string(values, "question"), _string(values, "answer"), system)


def _read_text(values: Values) -> Text:
    return Text(_string(values, "text"))


# In order of precedence: published Alpaca rows also have a "text" column, UltraChat's a "prompt".
FORMATS = (
    Format("messages", ("messages",), _read_messages, ("system",)),
    Format("sharegpt", ("conversations",), _read_sharegpt, ("system",)),
    Format("prompt-completion", ("prompt", "completion"), _read_prompt),
    Format(
        "alpaca", ("instruction", "output"), _instruction("input", "output"), ("input", "system")
    ),
    Format(
        "dolly",
        ("instruction", "response"),
        _instruction("context", "response"),
        ("context", "system"),
    ),
    Format("question-answer", ("question", "answer"), _read_question, ("system",)),
    Format("text", ("text",), _read_text),
)


def _nearest(values: Values) -> str:
    best: tuple[float, str] = (0.0, "")
    for format in FORMATS:
        spare = [column for column in values if column not in format.columns]
        missing = [column for column in format.columns if column not in values]
        renames = {}
        score = float(len(format.columns) - len(missing))
        for column in missing:
            near = difflib.get_close_matches(column, spare, n=1)
            if near:
                renames[column] = near[0]
                score += difflib.SequenceMatcher(None, column, near[0]).ratio()
        score /= len(format.columns)
        if score <= best[0]:
            continue
        steps = [
            f"rename {renames[c]!r} to {c!r}" if c in renames else f"add {c!r}" for c in missing
        ]
        best = (score, f"; nearest is {format.name}: {' and '.join(steps)}")
    return best[1]

"""What the columns of a row mean: the known dataset formats, and the typed content they give."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ardor.data.choices import Preferences
from ardor.data.readers import Row
from ardor.errors import DataError, TextError
from ardor.text.chat import ChatTemplate, TrainOn, checked, supervise
from ardor.text.example import Example, completion, document, segments
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
    variables: Mapping[str, Any] = field(default_factory=dict)  # tools, documents: the template's


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of text in which control tokens count, each trained on or not. Nothing is added."""

    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which the first is the better: what DPO trains on."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation


Content = Text | Completion | Conversation | Segments | Preference


@dataclass(frozen=True, slots=True)
class Format:
    """One way to name columns. `read` raises DataError for values of the wrong kind.

    What is read is one kind of content, but for columns that hold strings or messages.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Values], Content]
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


def read(row: Row) -> tuple[Format, Content]:
    """What a row holds.

    Raises: DataError naming the row.
    """
    _refuse_images(row)
    format = recognise(row.values, row.where)
    try:
        return format, format.read(row.values)
    except DataError as error:
        raise explained(row, format, error) from error


def _refuse_images(row: Row) -> None:
    """Raises: DataError: answers about what was not seen teach to make things up."""
    for column in ("images", "image"):
        if row.values.get(column):
            raise DataError(
                f"{row.where}: column {column!r} holds images, and only text can be read; leave "
                "such rows out, or the column where no answer is about them"
            )


def explained(row: Row, format: Format, error: Exception) -> DataError:
    """The error with the place of the row before it."""
    return DataError(f"{row.where} ({format.name}): {error}")


def examples_of(
    row: Row,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    preferences: Preferences = "refuse",
    train_on: TrainOn = "all",
) -> list[Example]:
    """The token sequences of a row, usually one, each ending with a stop token that is trained on.

    Messages, ShareGPT, question/answer and instruction rows become conversations and need a chat
    template. A prompt and a completion are messages if they are lists of messages, and are joined
    as they are, without any template, if they are strings. In a prompt nothing is trained on; of a
    conversation's answers, `train_on` and the messages' own flags say which are.
    Segments are taken as they are: they end with a stop token only if their text spells one.
    Of a preference nothing is learnt here, or the "chosen" answer. A row with no answer, or with
    blank ones only, gives no example.

    Raises: DataError naming the row.
    """
    format, content = read(row)
    try:
        return encoded(answer_of(content, preferences), tokenizer, template, train_on)
    except (DataError, TextError) as error:
        raise explained(row, format, error) from error


def answer_of(content: Content, preferences: Preferences) -> Content:
    """The content to train on: of a preference its better answer, where that is asked for.

    Raises: DataError for a preference where it is not.
    """
    if not isinstance(content, Preference):
        return content
    if preferences == "refuse":
        raise DataError(
            "the row compares two answers, which teaches a preference and no text; to train on the "
            "better one alone, set preferences=chosen"
        )
    return content.chosen


def encoded(
    content: Content,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn = "all",
) -> list[Example]:
    """The examples of one content: the reference of what `encode.Encoder` does for many.

    Raises: TextError or DataError if it cannot be encoded.
    """
    match content:
        case Text():
            return [document(tokenizer, content.text)] if content.text.strip() else []
        case Completion():
            if not content.completion.strip():
                return []
            return [completion(tokenizer, content.prompt, content.completion)]
        case Segments():
            if not any(trained and text.strip() for text, trained in content.parts):
                return []
            return [segments(tokenizer, content.parts)]
        case Conversation():
            return conversation_examples(content, tokenizer, template, train_on)
        case Preference():
            raise DataError("a preference is two contents; encode its chosen or its rejected one")


def preference_sides(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[list[Example]]:
    """The examples of the chosen and of the rejected side; none where the answer is blank.

    Raises: DataError naming the row, also where it is no preference.
    """
    _refuse_images(row)
    try:
        content = read_preference(row.values)
        return [encoded(side, tokenizer, template) for side in (content.chosen, content.rejected)]
    except (DataError, TextError) as error:
        raise DataError(f"{row.where} (preference): {error}") from error


def preference_pair(
    row: Row, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Example, Example] | None:
    """(chosen, rejected) of a preference row: the same prompt, then the answer that is judged.

    Only the last answer of each is marked as supervised. None where an answer is blank, or both
    are the same.

    Raises: DataError naming the row, also where it is no preference.
    """
    sides = preference_sides(row, tokenizer, template)
    if not all(sides) or sides[0] == sides[1]:
        return None
    return sides[0][-1], sides[1][-1]


def conversation_examples(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn = "all",
) -> list[Example]:
    """The examples of a conversation; none if it has no answer but blank ones.

    Raises: TextError or DataError if it cannot be encoded.
    """
    if template is None:
        raise DataError(
            "a conversation needs a chat template and this model has none; choose one with "
            "chat_template=chatml, or use the columns prompt and completion"
        )
    messages, given = checked(conversation.messages), conversation.given
    answers = [message for message in messages[given:] if _role(message) == "assistant"]
    if not any(text_of(answer).strip() or answer.get("tool_calls") for answer in answers):
        return []
    return supervise(
        tokenizer, template, messages, train_on=train_on, given=given, **conversation.variables
    )


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
    first = value[0]
    spoken = isinstance(first, Mapping) and "from" in first and _role(first) is None
    return _spoken(value) if spoken else list(value)


def _spoken(turns: Sequence[Any]) -> list[Any]:
    """ShareGPT's turns as messages."""
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            found = ", ".join(turn) if isinstance(turn, Mapping) else _kind(turn)
            raise DataError(f"turn {number} holds {found}; expected 'from' and 'value'")
        if turn["from"] not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            raise DataError(f"turn {number} is from {turn['from']!r}; known are {known}")
        message = {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
        messages.append(message | {k: v for k, v in turn.items() if k not in ("from", "value")})
    return messages


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | list | tuple) and not value:
        return f"an empty {type(value).__name__}"
    return f"{type(value).__name__} {value!r:.40}"


def _conversation(values: Values, messages: list[Any], given: int = 0) -> Conversation:
    """The messages, after the row's system prompt, with what else the template is given."""
    system = _optional_string(values, "system")
    if system and _role(messages[0]) != "system":
        messages, given = [{"role": "system", "content": system}, *messages], given and given + 1
    return Conversation(tuple(messages), given, _variables(values))


def _variables(values: Values) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for column in ("tools", "documents"):
        value = _from_json(values.get(column), column)
        if value is None or value == []:
            continue
        if not isinstance(value, list):
            raise DataError(f"column {column!r} holds {_kind(value)}, expected a list of objects")
        variables[column] = value
    given = _from_json(values.get("chat_template_kwargs"), "chat_template_kwargs")
    if given is not None and not isinstance(given, Mapping):
        raise DataError(f"column 'chat_template_kwargs' holds {_kind(given)}, expected an object")
    return variables | dict(given or {})


def _from_json(value: Any, column: str) -> Any:
    """The value, read where it is a string of JSON: tables have no nested columns."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"column {column!r} holds a string that is not JSON: {error}") from None


def _read_messages(values: Values) -> Conversation:
    return _conversation(values, _messages(values["messages"], "messages"))


def _read_sharegpt(values: Values) -> Conversation:
    turns = _messages(values["conversations"], "conversations")  # perhaps with a message's keys
    return _conversation(values, turns if _role(turns[0]) is not None else _spoken(turns))


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
    return _conversation(values, [*given, *_messages(answer, "completion")], len(given))


def _read_segments(values: Values) -> Segments:
    found = values["segments"]
    if not isinstance(found, list | tuple) or not found:
        raise DataError(f"column 'segments' holds {_kind(found)}, expected a list of segments")
    parts = []
    for number, segment in enumerate(found, 1):
        if not isinstance(segment, Mapping):
            raise DataError(
                f"segment {number} holds {_kind(segment)}; expected an object with 'text' and "
                "'label'"
            )
        text, label = segment.get("text"), segment.get("label", segment.get("train"))
        if not isinstance(text, str):
            raise DataError(f"segment {number}: 'text' is {_kind(text)}; expected a string")
        if not isinstance(label, bool):
            raise DataError(
                f"segment {number}: 'label' is {_kind(label)}; expected true (trained on) or false"
            )
        parts.append((text, label))
    return Segments(tuple(parts))


def read_preference(values: Values) -> Preference:
    """The two answers of a row with the columns chosen, rejected, and perhaps prompt.

    Both are strings, or both lists of messages. Without a prompt it is what the two begin with
    alike: the same messages, or the same text up to where they part, at the start of a word.

    Raises: DataError for values of the wrong kind, or answers with different prompts.
    """
    for column in ("chosen", "rejected"):
        if column not in values:
            raise DataError(f"there is no column {column!r}; expected chosen, rejected and prompt")
    chosen, rejected, prompt = values["chosen"], values["rejected"], values.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _preferred_strings(prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(
            f"chosen holds {_kind(chosen)} and rejected {_kind(rejected)}; expected two strings or "
            "two lists of messages"
        )
    sides = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    if isinstance(prompt, str) and all(_role(side[0]) == "assistant" for side in sides):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list | tuple):
        before = _messages(prompt, "prompt") if prompt else []
        sides = [[*before, *side] for side in sides]
        shared = len(before)
    else:
        # Else a string repeats what the messages begin with, as in UltraFeedback.
        pairs = enumerate(zip(*sides, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(map(len, sides)))
        shared = min(shared, *(len(side) - 1 for side in sides))
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not any(_role(message) == "assistant" for message in side[shared:]):
            raise DataError(f"column {name!r} has no assistant message after the prompt")
    better, worse = (_conversation(values, side, shared) for side in sides)
    return Preference(better, worse)


def _preferred_strings(prompt: Any, chosen: str, rejected: str) -> Preference:
    if prompt is None:
        together = zip(chosen, rejected, strict=False)
        at = next((i for i, (a, b) in enumerate(together) if a != b), 0)
        while at and not chosen[at].isspace():
            at -= 1
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    if not isinstance(prompt, str):
        raise DataError(f"prompt holds {_kind(prompt)}, expected a string, as chosen and rejected")
    return Preference(Completion(prompt, chosen), Completion(prompt, rejected))


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


_FOR_TEMPLATE = ("system", "tools", "documents", "chat_template_kwargs")

# In order of precedence: published Alpaca rows also have a "text" column, UltraChat's a "prompt",
# and UltraFeedback's the "messages" of the chosen answer.
FORMATS = (
    Format("messages", ("messages",), _read_messages, _FOR_TEMPLATE),
    Format("sharegpt", ("conversations",), _read_sharegpt, _FOR_TEMPLATE),
    Format("segments", ("segments",), _read_segments),
    Format("preference", ("chosen", "rejected"), read_preference, ("prompt", *_FOR_TEMPLATE)),
    Format("prompt-completion", ("prompt", "completion"), _read_prompt, _FOR_TEMPLATE),
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

"""What conversations of one shape have in common, found once: the tokens around their contents.

Most templates copy contents without reading them. Then all conversations with the same roles (and
the same fields but for their contents) differ in their contents only, and what `supervise` makes of
one says what it makes of all: runs of text, in which contents stand at known places, between known
tokens. A plan is made by `supervise` itself, on contents that report whatever a template does with
them, and with a tokenizer that notes what it is asked to encode.

A plan is used for a conversation only if each of these holds; else the reference encodes it.
- Every question that the template asked of the contents (does it contain `</think>`?) has the same
  answer; where the template trims, there is nothing to trim.
- The whole conversation, rendered, is what the plan says it is.
- The plan gave what the reference gives for the first conversation of its shape.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ardor.data.draft import Draft, Ids, Request
from ardor.data.formats import Conversation, conversation_examples
from ardor.errors import ArdorError
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.example import Example
from ardor.text.special import Place
from ardor.text.tokenizer import Tokenizer

SHAPES = 512  # known at once; beyond it they are all forgotten
LONGEST = 64  # messages: a plan costs the square of them
FIRST = 0xF0000  # private characters that stand for contents, the first message's and so on
_STANDINS = re.compile(f"[{chr(FIRST)}-{chr(FIRST + LONGEST)}]")

_Piece = str | int  # a literal text, or the number of the message whose content stands there
_Question = tuple[int, str, tuple[Any, ...], bool]  # message, method, arguments, answer


class _Run(NamedTuple):
    pieces: tuple[_Piece, ...]
    place: Place
    tags: bool
    supervised: bool


class Plan(NamedTuple):
    drafts: tuple[tuple[Ids | _Run, ...], ...]
    rendering: tuple[_Piece, ...]
    questions: frozenset[_Question]
    trims: bool


class Planner:
    """Drafts of conversations, by plans that are made as shapes turn up a second time."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, train_on: TrainOn = "all"
    ) -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self._plans: dict[str, Plan | None] = {}
        self._seen: set[str] = set()
        self._notes = _Notes()
        self._deferred = _Deferred.of(tokenizer)
        self._quick = copy.copy(template)
        self._quick._template = object.__new__(type(template._template))
        vars(self._quick._template).update(vars(template._template))
        # jinja2 copies them for each rendering, and from its chain of dicts that takes most of it.
        self._quick._template.globals = dict(template._template.globals)
        self._watched = copy.copy(template)
        self._watched._template = _Watching(template._template, self._notes)  # type: ignore[assignment]

    def drafts(self, conversation: Conversation) -> list[Draft] | None:
        """What the conversation's examples consist of; None where only the reference knows."""
        shape = _shape(conversation)
        if shape is None:
            return None
        if shape not in self._plans:
            if shape not in self._seen:
                if len(self._seen) >= SHAPES:
                    self._seen.clear()
                    self._plans.clear()
                self._seen.add(shape)
                return None
            self._plans[shape] = self._checked_plan(conversation)
        plan = self._plans[shape]
        return None if plan is None else self._apply(plan, conversation)

    def _checked_plan(self, conversation: Conversation) -> Plan | None:
        plan = self._plan(conversation)
        drafts = None if plan is None else self._apply(plan, conversation)
        if plan is None or drafts is None:
            return None
        expected = conversation_examples(conversation, self.tokenizer, self.template, self.train_on)
        return plan if [self._encoded(draft) for draft in drafts] == expected else None

    def _encoded(self, draft: Draft) -> Example:
        example = Example((), ())
        for part in draft:
            ids = (
                list(part.ids)
                if isinstance(part, Ids)
                else self.tokenizer.encode_content(
                    part.text, tags=part.tags, place=part.place or "start"
                )
            )
            example = example.then(ids, supervised=part.supervised)
        return example

    def _plan(self, conversation: Conversation) -> Plan | None:
        messages = [
            message | {"content": chr(FIRST + i)} if message["content"] else message
            for i, message in enumerate(conversation.messages)
        ]
        self._notes.clear()
        try:
            examples = conversation_examples(
                Conversation(tuple(messages), conversation.given, conversation.variables),
                self._deferred,
                self._watched,
                self.train_on,
            )
            rendering = self._watched.render(messages, **conversation.variables)
        except (ArdorError, _Unplannable):
            return None
        if not examples:
            return None
        return Plan(
            tuple(self._drafted(example) for example in examples),
            _pieces(rendering),
            frozenset(self._notes.questions),
            self._notes.trims,
        )

    def _drafted(self, example: Example) -> tuple[Ids | _Run, ...]:
        """The example with what was asked for in the place of the tokens that stand for it."""
        parts: list[Ids | _Run] = []
        known: list[int] = []
        flag = False
        for token, supervised in zip(example.tokens, example.supervised, strict=True):
            asked = self._deferred.asked.get(token)
            if known and (asked or supervised != flag):
                parts.append(Ids(tuple(known), flag))
                known = []
            flag = supervised
            if asked is None:
                known.append(token)
            else:
                text, tags, place = asked
                parts.append(_Run(_pieces(text), place, tags, supervised))
        return (*parts, Ids(tuple(known), flag)) if known else tuple(parts)

    def _apply(self, plan: Plan, conversation: Conversation) -> list[Draft] | None:
        contents = [message["content"] for message in conversation.messages]
        for message, method, arguments, answer in plan.questions:
            if getattr(contents[message], method)(*arguments) != answer:
                return None
        if plan.trims and any(content != content.strip() for content in contents):
            return None
        try:
            rendering = self._quick.render(conversation.messages, **conversation.variables)
        except ArdorError:
            return None
        if rendering != _filled(plan.rendering, contents):
            return None
        return [
            tuple(
                Request(_filled(part.pieces, contents), part.place, part.tags, part.supervised)
                if isinstance(part, _Run)
                else part
                for part in draft
            )
            for draft in plan.drafts
        ]


def _shape(conversation: Conversation) -> str | None:
    """All of a conversation but its contents; None if that cannot be told from them."""
    shape: list[Any] = [conversation.given, conversation.variables]
    if len(conversation.messages) > LONGEST:
        return None
    for message in conversation.messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if not isinstance(content, str) or content.isspace():
            return None
        shape += [bool(content), message["role"]]
        if len(message) > 2:
            shape.append({key: value for key, value in message.items() if key != "content"})
    try:
        found = json.dumps(shape, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError):
        return None
    return None if _STANDINS.search(found) else found


def _pieces(text: str) -> tuple[_Piece, ...]:
    found: list[_Piece] = []
    done = 0
    for match in _STANDINS.finditer(text):
        found += [text[done : match.start()], ord(match[0]) - FIRST]
        done = match.end()
    return (*found, text[done:])


def _filled(pieces: tuple[_Piece, ...], contents: list[str]) -> str:
    return "".join([contents[p] if isinstance(p, int) else p for p in pieces])


# ---- what makes a plan ----


class _Unplannable(Exception):
    """A template reads a content in a way that a plan cannot repeat."""


class _Notes:
    """What templates did with contents while a plan was made."""

    def __init__(self) -> None:
        self.questions: set[_Question] = set()
        self.trims = False

    def clear(self) -> None:
        self.questions, self.trims = set(), False


class _Deferred(Tokenizer):
    """A tokenizer that gives one made-up id for each text that holds a content, and notes it."""

    asked: dict[int, tuple[str, bool, Place]]
    _given: dict[tuple[str, bool, Place], int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_Deferred":
        made = cls.__new__(cls)
        made.__dict__.update(vars(tokenizer))
        made.asked, made._given = {}, {}
        return made

    def encode_content(
        self, text: str, *, tags: bool = False, place: Place = "middle"
    ) -> list[int]:
        if _STANDINS.search(text) is None:
            return super().encode_content(text, tags=tags, place=place)
        key = (text, tags, place)
        if key not in self._given:
            self._given[key] = (1 << 40) + len(self._given)
            self.asked[self._given[key]] = key
        return [self._given[key]]


class _Watching:
    """A jinja2 template whose messages report what is done with their contents."""

    def __init__(self, template: Any, notes: _Notes) -> None:
        self._template, self._notes = template, notes

    def render(self, **values: Any) -> str:
        return self._template.render(**values | {"messages": self._watch(values["messages"])})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)

    def _watch(self, value: Any) -> Any:
        if isinstance(value, str):
            return _Watched.of(value, self._notes) if _STANDINS.fullmatch(value) else value
        if isinstance(value, Mapping):
            return {key: self._watch(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._watch(item) for item in value]
        return value


class _Watched(str):
    """A content, or a text with one in it, that notes questions and refuses to be read.

    It may be copied, joined to other text, and trimmed; where it stands alone it may be asked what
    it contains, begins with, ends with or equals.
    """

    notes: _Notes
    message: int | None  # None: not a content alone

    @classmethod
    def of(cls, text: str, notes: _Notes) -> "_Watched":
        made = cls(text)
        made.notes = notes
        made.message = ord(text) - FIRST if _STANDINS.fullmatch(text) else None
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in _REFUSED:
            raise _Unplannable(name)
        return super().__getattribute__(name)

    def _ask(self, method: str, *arguments: Any) -> bool:
        if self.message is None:
            raise _Unplannable(method)
        answer = getattr(str, method)(str.__str__(self), *arguments)
        self.notes.questions.add((self.message, method, arguments, answer))
        return answer

    def __contains__(self, part: object) -> bool:
        return self._ask("__contains__", _plain(part))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._ask("__eq__", _plain(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __bool__(self) -> bool:
        return True  # whether a content is empty belongs to the shape

    def startswith(self, *prefix: Any) -> bool:
        return self._ask("startswith", *map(_plain, prefix))

    def endswith(self, *suffix: Any) -> bool:
        return self._ask("endswith", *map(_plain, suffix))

    def _trim(self, method: str, chars: str | None) -> "_Watched":
        if chars is not None and not (isinstance(chars, str) and chars.isspace()):
            raise _Unplannable(method)
        self.notes.trims = True
        return _Watched.of(getattr(str, method)(str.__str__(self), chars), self.notes)

    def strip(self, chars: str | None = None) -> "_Watched":
        return self._trim("strip", chars)

    def lstrip(self, chars: str | None = None) -> "_Watched":
        return self._trim("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> "_Watched":
        return self._trim("rstrip", chars)

    def __add__(self, other: str) -> "_Watched":
        return _Watched.of(str.__str__(self) + other, self.notes)

    def __radd__(self, other: str) -> "_Watched":
        return _Watched.of(other + str.__str__(self), self.notes)


def _plain(value: Any) -> Any:
    if isinstance(value, _Watched):  # two contents compared
        raise _Unplannable("comparison")
    return value


def _refuse(name: str) -> Callable[..., Any]:
    def refused(self: _Watched, *_: Any) -> Any:
        raise _Unplannable(name)

    return refused


def _no_items(self: _Watched) -> Any:
    # A template may ask whether something is iterable; not for what is in it.
    raise _Unplannable("iteration")
    yield


_REFUSED = frozenset(
    name
    for name in dir(str)
    if not name.startswith("_") and name not in vars(_Watched) and name not in ("join",)
)
for _name in (
    "__len__",
    "__getitem__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__mul__",
    "__mod__",
):
    setattr(_Watched, _name, _refuse(_name))
_Watched.__iter__ = _no_items  # type: ignore[method-assign]

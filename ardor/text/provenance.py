"""Where each character of a rendered conversation comes from: the template, or what people wrote.

The template is run twice: once as it is, and once with marks in the place of what people wrote. A
content gives way to a mark of its own, as long as the template only copies or trims it; everything
else is left in its place, with marks around the control tokens that it spells. Whatever the second
rendering says is believed only if the first one comes out of it character by character.

A third one has marks around everything that people wrote. A control token that it lacks was made of
the template's text and theirs, as by '<|' ~ message.name ~ '|>', and is no control token either.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from ardor.errors import TextError
from ardor.text.messages import THOUGHTS
from ardor.text.template import ChatTemplate
from ardor.text.tokenizer import Tokenizer

SPELLED = -1
SAID = ("role", "content", *THOUGHTS)  # keys of what every message may have

# Who speaks in released formats, some of which write a token of that name: <|user|>.
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")
ROLES += ("observation",)


class Piece(NamedTuple):
    """A stretch of a rendering.

    `owner` is None for the template's own text, the number of the message whose content or thought
    it is, or SPELLED for what somebody wrote elsewhere that spells or completes a control token.
    """

    text: str
    owner: int | None


class _Leaf(NamedTuple):
    message: int
    text: str
    thought: bool
    part: int | None  # of a content in parts


class _Given(NamedTuple):
    """What a template is given, with marks in it."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]


class Conversation:
    """Messages and variables that are rendered several times, up to one message or another.

    `messages` are checked and readable for `template`, and `variables` prepared.

    Raises: TextError if a role spells a control token, or is completed to one by the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
    ) -> None:
        self.template, self.messages, self.variables = template, messages, dict(variables)
        self._tokenizer = tokenizer
        for number, message in enumerate(messages, 1):
            if (token := tokenizer.control_in(message["role"])) is not None:
                raise TextError(
                    f"'role' of message {number} spells the control token {token!r}, which the "
                    "template would write as that token; remove it"
                )
        texts = [template.source, *_strings([messages, *self._own_variables().values()])]
        taken = set().union(*texts)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in taken)
        self._mark, self._open, self._close = (next(free, "") for _ in range(3))
        self._check_roles()
        self._wrapped = [self._wrap_message(message) for message in messages]
        self._wrapped_variables = self.variables | {
            key: self._wrap(value, False) for key, value in self._own_variables().items()
        }
        self._leaves = list(_leaves(messages))
        self._spelled = {
            i
            for i, leaf in enumerate(self._leaves)
            if spells(tokenizer, leaf.text, tags=messages[leaf.message]["role"] == "assistant")
        }

    def _check_roles(self) -> None:
        """A template that writes '<|' ~ role ~ '|>' means its own roles, not any token's name.

        Control tokens that are gone once another name stands in the role's place come of the role.
        A template that knows a role by its name does not write the other one, and is believed.
        """
        for number, message in enumerate(self.messages):
            role = message["role"]
            if role in ROLES or not self._mark:
                continue
            marked = [*self.messages]
            marked[number] = message | {"role": self._mark}
            try:
                text = self.template.write(self.messages, False, self.variables)
                other = self.template.write(marked, False, self.variables)
            except TextError:
                continue
            if self._mark in other and (made := self._control(text) - self._control(other)):
                token = self._tokenizer.token(next(iter(made)))
                raise TextError(
                    f"'role' of message {number + 1} of {len(self.messages)} is {role!r}, which "
                    f"{self.template.name} completes to the control token {token!r}; use a role "
                    f"such as {', '.join(ROLES[:4])}, or name this one in the template"
                )

    def _control(self, text: str) -> Counter[int]:
        return Counter(part for part in self._tokenizer.split(text) if isinstance(part, int))

    def text(self, count: int, add_generation_prompt: bool) -> str:
        """The rendering of the first `count` messages."""
        return self.template.write(self.messages[:count], add_generation_prompt, self.variables)

    def pieces(self, count: int, text: str, add_generation_prompt: bool) -> list[Piece]:
        """`text`, the rendering of the first `count` messages, piece by piece.

        Every content is a piece of its own, unless the template reads or rewrites one of them.

        Raises: TextError if a control token is spelled, or completed to one by the template, where
        it cannot be told from a real one.
        """
        found = self._spelled_apart(count, text, add_generation_prompt)
        whole = sum(leaf.message < count for leaf in self._leaves)
        alone = sum(piece.owner not in (None, SPELLED) for piece in found) == whole
        if alone and not self._fields:
            return found
        return self._completed_apart(count, text, add_generation_prompt, found)

    def _spelled_apart(self, count: int, text: str, add_generation_prompt: bool) -> list[Piece]:
        """`pieces`, as far as control tokens are spelled in full."""
        every = [i for i, leaf in enumerate(self._leaves) if leaf.message < count]
        contents = [i for i in every if not self._leaves[i].thought]
        spelled = [i for i in every if i in self._spelled]
        tries = [every]
        tries += [chosen for chosen in (contents, spelled) if chosen not in tries]
        for chosen in tries:
            if chosen and (found := self.cut(count, text, add_generation_prompt, chosen)):
                return found
        wrapped = self._wrapped[:count], self._wrapped_variables
        if wrapped == (self.messages[:count], self.variables):
            return [Piece(text, None)]
        if (found := self.cut(count, text, add_generation_prompt, [])) is not None:
            return found
        raise self._cannot_keep(count)

    def _completed_apart(
        self, count: int, text: str, add_generation_prompt: bool, found: list[Piece]
    ) -> list[Piece]:
        """`found`, unless control tokens in it are gone once all that people wrote is marked.

        Then everything that the template copies is a piece of its own.

        Raises: TextError where it completes what it reads or rewrites.
        """
        real = self._controls(found)
        every = [i for i, leaf in enumerate(self._leaves) if leaf.message < count]
        given = self._given()
        for chosen in (every, []):
            exact = self.cut(count, text, add_generation_prompt, chosen, given)
            if exact is not None:
                return exact if real - self._controls(exact) else found
        other = self._rendered(count, add_generation_prompt, given)
        if other is None or not real - self._control(self._without_given(other)):
            return found
        copied = set()
        for i, label in enumerate(self._labels):
            one = self._given({i})
            if self.cut(count, text, add_generation_prompt, [], one) is not None:
                copied.add(i)
                continue
            other = self._rendered(count, add_generation_prompt, self._given({i}, self._mark))
            lost = real - self._control(other or "")
            if other is not None and self._mark in other and lost:
                token = self._tokenizer.token(next(iter(lost)))
                raise TextError(
                    f"{label} completes the control token {token!r} in {self.template.name}, which "
                    "rewrites it, so it cannot be kept as text; change it"
                )
        exact = self.cut(count, text, add_generation_prompt, [], self._given(copied))
        return exact if exact is not None and real - self._controls(exact) else found

    def _controls(self, pieces: list[Piece]) -> Counter[int]:
        """The control tokens in the template's own text."""
        found: Counter[int] = Counter()
        for piece in pieces:
            if piece.owner is None:
                found += self._control(piece.text)
        return found

    def _rendered(self, count: int, add_generation_prompt: bool, given: _Given) -> str | None:
        try:
            return self.template.write(
                given.messages[:count], add_generation_prompt, given.variables
            )
        except TextError:  # the template reads what is marked
            return None

    def _without_given(self, text: str) -> str:
        """The text without what stands between marks."""
        inside = f"{self._open}[^{self._open}{self._close}]*{self._close}"
        return re.sub(inside, self._open + self._close, text)

    def _given(self, only: Collection[int] | None = None, replaced: str | None = None) -> _Given:
        """Everything that people wrote but roles, with marks around it, or `replaced`.

        `only` are numbers of `_labels`. What the template may look for stays as it is, unless it is
        a part of a control token.
        """
        numbers = iter(range(len(self._labels)))

        def mark(text: str, tags: bool) -> str:
            if self._is_known(text) or (only is not None and next(numbers) not in only):
                return text
            return self._enclosed(text, tags) if replaced is None else replaced

        return self._mapped(lambda text, tags, _: mark(text, tags))

    def _is_known(self, text: str) -> bool:
        return not text.strip() or (
            text in self.template.words
            and not any(text.casefold() in token for token in _patterns(self._tokenizer).texts)
        )

    def _mapped(self, change: Callable[[str, bool, str], str]) -> _Given:
        """Messages and variables with all strings in them changed, but roles.

        `change` gets the string, whether tags are tokens in it, and where it stands.
        """

        def walk(value: Any, tags: bool, label: str) -> Any:
            if isinstance(value, str):
                return change(value, tags, label)
            if isinstance(value, dict):
                return {
                    walk(key, tags, label): walk(item, tags, label) for key, item in value.items()
                }
            if isinstance(value, list | tuple):
                return [walk(item, tags, label) for item in value]
            return value

        messages = []
        for number, message in enumerate(self.messages, 1):
            tags, where = (
                message["role"] == "assistant",
                f"message {number} of {len(self.messages)}",
            )
            changed: dict[str, Any] = {"role": message["role"]}
            for key, value in message.items():
                label = f"{key!r} of {where}"
                if key != "role":
                    name = key if key in SAID else change(key, False, label)
                    changed[name] = walk(value, tags, label)
            messages.append(changed)
        own = {k: walk(v, False, repr(k)) for k, v in self._own_variables().items()}
        return _Given(messages, self.variables | own)

    @cached_property
    def _labels(self) -> list[str]:
        """Where each string stands that may complete a control token."""
        labels: list[str] = []

        def note(text: str, _: bool, label: str) -> str:
            if not self._is_known(text):
                labels.append(label)
            return text

        self._mapped(note)
        return labels

    @cached_property
    def _fields(self) -> bool:
        """Is there more than contents and thoughts?"""
        others = [[v for k, v in message.items() if k not in SAID] for message in self.messages]
        return any(True for _ in _strings([others, *self._own_variables().values()]))

    def _enclosed(self, text: str, tags: bool) -> str:
        """The text between marks, but for white space around it, and for tags where they count."""
        kept = f"({_patterns(self._tokenizer).tags.pattern})" if tags else "((?!))"
        parts = re.split(kept, text)
        for i in range(0, len(parts), 2):
            if core := parts[i].strip():
                before, behind = parts[i].split(core, 1)
                parts[i] = f"{before}{self._open}{core}{self._close}{behind}"
        return "".join(part for part in parts if part)

    def cut(
        self,
        count: int,
        text: str,
        add_generation_prompt: bool,
        chosen: list[int] | None = None,
        given: _Given | None = None,
    ) -> list[Piece] | None:
        """`text` cut around the `chosen` leaves (None: all), and what is marked in `given`.

        None if the marks do not fit it.
        """
        if not self._close:
            return None
        chosen = list(range(len(self._leaves))) if chosen is None else chosen
        given = given or _Given(self._wrapped, self._wrapped_variables)
        marked = list(given.messages[:count])
        for i in chosen:
            if (leaf := self._leaves[i]).message < count:
                mark = f"{self._mark}{i}{self._mark}"
                marked[leaf.message] = _replaced(marked[leaf.message], leaf, mark)
        skeleton = self._rendered(count, add_generation_prompt, given._replace(messages=marked))
        return None if skeleton is None else self._fill(skeleton, text)

    def _fill(self, skeleton: str, text: str) -> list[Piece] | None:
        """The pieces of `text`, which must be `skeleton` with each mark's text in its place."""
        first, *rest = re.split(f"{self._mark}([0-9]+){self._mark}", skeleton)
        found = self._literal(first, text, 0)
        for number, literal in zip(rest[::2], rest[1::2], strict=True):
            if found is None:
                return None
            pieces, at = found
            leaf = self._leaves[int(number)]
            plain = literal.replace(self._open, "").replace(self._close, "")
            fits = (form for form in _forms(leaf.text) if text.startswith(form + plain, at))
            if (form := next(fits, None)) is None:
                return None
            following = self._literal(literal, text, at + len(form))
            if following is None:
                return None
            more, at = following
            found = [*pieces, Piece(form, leaf.message), *more], at
        if found is None or found[1] != len(text):
            return None
        return found[0]

    def _literal(self, literal: str, text: str, at: int) -> tuple[list[Piece], int] | None:
        """What lies between two marks, with the control tokens in it that somebody spelled."""
        pieces = []
        wrapped = f"{self._open}([^{self._open}{self._close}]*){self._close}"
        for i, part in enumerate(re.split(wrapped, literal)):
            if not text.startswith(part, at):  # a mark alone is in no text
                return None
            pieces.append(Piece(part, SPELLED if i % 2 else None))
            at += len(part)
        return pieces, at

    def _own_variables(self) -> dict[str, Any]:
        names = self._tokenizer.names
        return {
            key: value
            for key, value in self.variables.items()
            if key not in names and not callable(value)
        }

    def _wrap_message(self, message: dict[str, Any]) -> dict[str, Any]:
        # A model writes tags such as <think> itself, and so they are tokens in what it wrote.
        tags = message["role"] == "assistant"
        return {
            key: value if key == "role" else self._wrap(value, tags)
            for key, value in message.items()
        }

    def _wrap(self, value: Any, tags: bool) -> Any:
        if isinstance(value, str):
            if spells(self._tokenizer, value, tags=tags) is None:
                return value
            pattern = _patterns(self._tokenizer).of(tags=tags)
            wrapped, count = pattern.subn(f"{self._open}\\g<0>{self._close}", value)
            return wrapped if count else f"{self._open}{value}{self._close}"
        if isinstance(value, dict):
            pairs = value.items()
            return {self._wrap(key, tags): self._wrap(item, tags) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self._wrap(item, tags) for item in value]
        return value

    def _cannot_keep(self, count: int) -> TextError:
        why = f"{self.template.name} rewrites it, so it cannot be kept as text; remove it"
        for number, message in enumerate(self.messages[:count], 1):
            for key, value in message.items():
                for text in _strings(value):
                    tags = message["role"] == "assistant"
                    if (token := spells(self._tokenizer, text, tags=tags)) is not None:
                        return TextError(
                            f"message {number} of {len(self.messages)} spells the control token "
                            f"{token!r} in its {key!r}, and {why}"
                        )
        for key, value in self._own_variables().items():
            for text in _strings(value):
                if (token := spells(self._tokenizer, text)) is not None:
                    return TextError(f"{key!r} spells the control token {token!r}, and {why}")
        return TextError(f"{self.template.name} cannot be followed, so no control token is kept")


def spells(tokenizer: Tokenizer, text: str, *, tags: bool = False) -> str | None:
    """The first control token that `text` spells, if any; with `tags`, tags are allowed."""
    found = _patterns(tokenizer).of(tags=tags).search(text)
    if found is None and _patterns(tokenizer).loose:
        return tokenizer.control_in(text, tags=tags)
    return found and found[0]


class _Patterns(NamedTuple):
    """Control tokens as text: all of them, and those that are no tags."""

    every: re.Pattern[str]
    but_tags: re.Pattern[str]
    tags: re.Pattern[str]
    texts: tuple[str, ...]  # without regard to case
    loose: bool  # some are found in normalized text, so that more spellings than one count

    def of(self, *, tags: bool) -> re.Pattern[str]:
        """Those that are looked for in a text in which tags are allowed, or not."""
        return self.but_tags if tags else self.every


@lru_cache(maxsize=8)
def _patterns(tokenizer: Tokenizer) -> _Patterns:
    # Longest first: the tokenizers library, too, takes the longest that starts at a place.
    texts = sorted((t for t, id in tokenizer.added.items() if id in tokenizer.control), key=len)
    others = [text for text in texts if tokenizer.added[text] not in tokenizer.tags]
    tags = [text for text in texts if tokenizer.added[text] in tokenizer.tags]
    every, but_tags, only_tags = (
        re.compile("|".join(map(re.escape, reversed(kind))) or "(?!)")
        for kind in (texts, others, tags)
    )
    folded = tuple(text.casefold() for text in texts)
    return _Patterns(every, but_tags, only_tags, folded, tokenizer.normalizes_control)


def after(pieces: list[Piece], length: int) -> list[Piece]:
    """The pieces of the text that is left when the first `length` characters are gone."""
    left = []
    for text, owner in pieces:
        if rest := text[length:]:
            left.append(Piece(rest, owner))
        length = max(0, length - len(text))
    return left


def before(pieces: list[Piece], length: int) -> list[Piece]:
    """The pieces of the first `length` characters."""
    kept = []
    for text, owner in pieces:
        if first := text[:length]:
            kept.append(Piece(first, owner))
        length = max(0, length - len(text))
    return kept


def _leaves(messages: list[dict[str, Any]]) -> Iterator[_Leaf]:
    for number, message in enumerate(messages):
        if "reasoning_content" in message:
            yield _Leaf(number, message["reasoning_content"], True, None)
        content = message.get("content")
        if isinstance(content, str):
            yield _Leaf(number, content, False, None)
        elif isinstance(content, list):
            for i, part in enumerate(content):
                yield _Leaf(number, part["text"], False, i)


def _replaced(message: dict[str, Any], leaf: _Leaf, mark: str) -> dict[str, Any]:
    if leaf.thought:
        return message | {"reasoning_content": mark, "thinking": mark}
    if leaf.part is None:
        return message | {"content": mark}
    content = list(message["content"])
    content[leaf.part] = content[leaf.part] | {"text": mark}
    return message | {"content": content}


def _forms(text: str) -> Iterator[str]:
    """What templates make of a text that they do not look at."""
    yield text
    yield from (text.strip(), text.lstrip(), text.rstrip())
    yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    yield json.dumps(text, ensure_ascii=False)[1:-1]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)

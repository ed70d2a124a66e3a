"""Many rows to tokens at once: the same examples as `formats.examples_of`, several times faster.

A row becomes drafts: what its examples consist of, with texts in the place of tokens. The texts of
many rows are encoded together, on all cores and without the interpreter's lock, while the next rows
are read. Whatever cannot be drafted, or fails, is left to the reference, row by row.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ardor.data.choices import Preferences
from ardor.data.draft import Draft, Ids, Request
from ardor.data.formats import (
    Completion,
    Content,
    Conversation,
    Format,
    Text,
    answer_of,
    encoded,
    explained,
    read,
)
from ardor.data.lengths import Marked
from ardor.data.plan import Planner
from ardor.data.readers import Row
from ardor.errors import DataError, TextError
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.example import Example
from ardor.text.special import Place
from ardor.text.tokenizer import Tokenizer

CHUNK_ROWS, CHUNK_CHARS = 1024, 1 << 21  # encoded together: enough for all cores, little memory
LONG = 1 << 20  # characters of a text from which on it is encoded in parts
WINDOW = 512  # characters on either side of a border that must not depend on what is beyond


class Encoded(NamedTuple):
    row: Row
    format: Format
    content: Content  # of a preference the one that is trained on
    examples: list[Marked]


@dataclass
class _Chunk:
    rows: list[tuple[Row, Format, Content, list[Draft] | None]] = field(default_factory=list)
    chars: int = 0
    error: DataError | None = None  # of the row after these

    @property
    def full(self) -> bool:
        return len(self.rows) >= CHUNK_ROWS or self.chars >= CHUNK_CHARS


class Encoder:
    """Rows to examples, as `examples_of` makes them, in the order of the rows.

    `fast` False leaves every row to that reference.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        preferences: Preferences = "refuse",
        train_on: TrainOn = "all",
        fast: bool = True,
    ) -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self.preferences: Preferences = preferences
        self.fast = fast and tokenizer.special.eos is not None
        self._planner = None if template is None else Planner(tokenizer, template, train_on)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Encoded]:
        """The examples of each row.

        Raises: DataError naming the first row that cannot be read or encoded, after the rows
        before it.
        """
        waiting: list[tuple[_Chunk, Future[list[list[Marked] | None]]]] = []
        with ThreadPoolExecutor(1, "encode") as worker:
            try:
                for chunk in self._chunks(rows):
                    waiting.append((chunk, worker.submit(self._encode, chunk)))
                    if len(waiting) > 1:
                        yield from self._finished(*waiting.pop(0))
                for pair in waiting:
                    yield from self._finished(*pair)
            finally:
                worker.shutdown(cancel_futures=True)

    def _chunks(self, rows: Iterable[Row]) -> Iterator[_Chunk]:
        chunk = _Chunk()
        try:
            for row in rows:
                format, content = read(row)
                try:
                    content = answer_of(content, self.preferences)
                except DataError as error:
                    raise explained(row, format, error) from error
                drafts = self._drafts(content) if self.fast else None
                chunk.rows.append((row, format, content, drafts))
                chunk.chars += sum(map(_size, drafts or ()))
                if chunk.full:
                    yield chunk
                    chunk = _Chunk()
        except DataError as error:
            chunk.error = error
        yield chunk

    def _drafts(self, content: Content) -> list[Draft] | None:
        """What the examples of `content` consist of; None where only the reference knows."""
        tokenizer, stop = self.tokenizer, self.tokenizer.special.eos
        assert stop is not None  # else nothing is fast
        match content:
            case Text():
                if not content.text.strip():
                    return []
                parts = [
                    Request(text, "middle" if i else "start", False, True)
                    for i, text in enumerate(_parts(tokenizer, content.text))
                ]
                return [(Ids(tokenizer.prefix, True), *parts, Ids((stop,), True))]
            case Completion():
                if not content.completion.strip():
                    return []
                answer = Request(content.completion, "middle", True, True)
                return [(Request(content.prompt, None, False, False), answer, Ids((stop,), True))]
            case Conversation() if self._planner is not None:
                return self._planner.drafts(content)
        return None

    def _encode(self, chunk: _Chunk) -> list[list[Marked] | None]:
        """The examples of each drafted row; None where that failed, or there were no drafts."""
        texts: dict[tuple[Place | None, bool], list[str]] = {}
        for *_, drafts in chunk.rows:
            for draft in drafts or ():
                for part in draft:
                    if isinstance(part, Request):
                        texts.setdefault((part.place, part.tags), []).append(part.text)
        try:
            ids = {
                kind: iter(
                    self.tokenizer.encode_many(group)
                    if kind[0] is None
                    else self.tokenizer.encode_contents(group, place=kind[0], tags=kind[1])
                )
                for kind, group in texts.items()
            }
        except TextError:  # the reference will find the row
            return [None] * len(chunk.rows)
        return [
            None if drafts is None else [_assemble(draft, ids) for draft in drafts]
            for *_, drafts in chunk.rows
        ]

    def _finished(
        self, chunk: _Chunk, future: "Future[list[list[Marked] | None]]"
    ) -> Iterator[Encoded]:
        for (row, format, content, _), found in zip(chunk.rows, future.result(), strict=True):
            if found is None:
                try:
                    examples = encoded(content, self.tokenizer, self.template, self.train_on)
                except (DataError, TextError) as error:
                    raise explained(row, format, error) from error
                found = [marked(example) for example in examples]
            yield Encoded(row, format, content, found)
        if chunk.error is not None:
            raise chunk.error


def marked(example: Example) -> Marked:
    """The example as arrays."""
    return Marked(
        np.array(example.tokens, dtype=np.int32), np.array(example.supervised, dtype=np.bool_)
    )


def _size(draft: Draft) -> int:
    return sum(len(part.text) for part in draft if isinstance(part, Request))


def _assemble(draft: Draft, ids: dict[tuple[Place | None, bool], Iterator[list[int]]]) -> Marked:
    tokens: list[int] = []
    marks, lengths = [], []
    for part in draft:
        found = part.ids if isinstance(part, Ids) else next(ids[part.place, part.tags])
        tokens.extend(found)
        marks.append(part.supervised)
        lengths.append(len(found))
    return Marked(np.array(tokens, dtype=np.int32), np.repeat(marks, lengths))


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    """`text`, cut where that changes no token if it is so long that it had better be cut.

    A cut is tried at the end of a line: the text around it must have the same tokens whole and cut.
    """
    parts, start = [], 0
    while len(text) - start > LONG:
        at = start + LONG
        for _ in range(64):
            at = text.rfind("\n", start + WINDOW, at) + 1
            if at <= start + WINDOW or _splits(tokenizer, text, at):
                break
        else:
            at = 0
        if at <= start + WINDOW:
            break
        parts.append(text[start:at])
        start = at
    return [*parts, text[start:]]


def _splits(tokenizer: Tokenizer, text: str, at: int) -> bool:
    before, behind = text[at - WINDOW : at], text[at : at + WINDOW]
    whole = tokenizer.encode_content(before + behind)
    return whole == tokenizer.encode_content(before) + tokenizer.encode_content(behind)

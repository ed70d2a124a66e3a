"""What the rows of a dataset are like: every count that the rules about data judge, in one pass."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from ardor.data.choices import Preferences
from ardor.data.formats import (
    Completion,
    Content,
    Preference,
    Segments,
    Text,
    examples_of,
    recognise,
)
from ardor.data.readers import Row
from ardor.errors import ArdorError, DataError
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.example import Example
from ardor.text.tokenizer import Tokenizer

ROWS = 10_000  # looked at unless asked otherwise
IGNORED = -100  # a label that is no target, as everyone writes it
NAMED = 5  # places that a count names
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LONG = 100  # characters from which an answer may have been cut by a limit
ENDS = tuple(".!?:;)]}>\"'`*|。！？…”’»」")  # what a finished answer may end with


@dataclass
class Found:
    """How many rows something was found in, and the first of their places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < NAMED:
            self.places.append(place)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f" and {self.count - len(self.places):,} more" if self.count > NAMED else ""
        return "; ".join(self.places) + more


@dataclass
class Sample:
    """The rows that were looked at. Counts are of rows, unless a name says otherwise."""

    rows: int = 0
    more: bool = False  # there are more rows than were looked at
    limit: int | None = None  # tokens of an example
    formats: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)  # tokens of each example
    targets: int = 0  # tokens that are predicted
    characters: int = 0  # of the texts that were encoded
    unknown_tokens: int = 0
    broken: Found = field(default_factory=Found)  # cannot be read or encoded: with the reason
    empty: Found = field(default_factory=Found)  # no target after the shift
    unstopped: Found = field(default_factory=Found)  # the last target is no stop token
    open_ended: Found = field(default_factory=Found)  # the same, of segments: taken as written
    over: Found = field(default_factory=Found)  # longer than the limit, and not a plain text
    shifted: Found = field(default_factory=Found)  # labels that were shifted already
    masked_ends: Found = field(default_factory=Found)  # a stop token in the ids, not in the labels
    outside: Found = field(default_factory=Found)  # ids that the model lacks
    named: dict[int, Found] = field(default_factory=dict)  # by id, of added and special tokens
    control: Found = field(default_factory=Found)  # a control token spelled in a content
    unknown: Found = field(default_factory=Found)  # the unknown token stands for a character
    replaced: Found = field(default_factory=Found)  # U+FFFD: the text was decoded wrongly before
    spaced: Found = field(default_factory=Found)  # a prompt that ends in a space
    merged: Found = field(default_factory=Found)  # a boundary where joint encoding differs
    cut: Found = field(default_factory=Found)  # answers of the same, greatest length without an end
    duplicates: Found = field(default_factory=Found)
    leaked: Found = field(default_factory=Found)  # rows of the held-out data that are here too
    leaked_prompts: Found = field(default_factory=Found)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def completions(self) -> int:
        return self.formats["prompt-completion"]

    @property
    def conversations(self) -> int:
        plain = ("text", "prompt-completion", "tokenized")
        return sum(count for name, count in self.formats.items() if name not in plain)

    def where(self, id: int) -> str | None:
        """The first row that holds an added or special token, if any does."""
        return self.named[id].places[0] if id in self.named else None

    def histogram(self) -> list[tuple[str, int]]:
        """(range of tokens, examples) from the shortest to the longest that occur."""
        if not self.lengths:
            return []
        longest = max(self.lengths)
        edges = [*(edge for edge in (0, *BUCKETS) if edge <= longest), longest + 1]
        counts = [
            (f"{low:,}-{high - 1:,}", sum(low <= n < high for n in self.lengths))
            for low, high in pairwise(edges)
        ]
        held = [i for i, (_, count) in enumerate(counts) if count]
        return counts[held[0] : held[-1] + 1]


@dataclass(frozen=True)
class Reading:
    """What a dataset is read for: a model's tokenizer, template and ids."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stops: frozenset[int]
    vocab: int | None  # rows of the embedding
    limit: int | None  # tokens of an example
    preferences: Preferences
    train_on: TrainOn


def sample(
    rows: Iterable[Row], reading: Reading, *, most: int = ROWS, heldout: Iterable[Row] = ()
) -> Sample:
    """Look at the first `most` rows. Nothing a row holds raises: it is counted, with its place."""
    taken = iter(rows)
    found = Sample(limit=reading.limit)
    held = _Held(found, reading)
    try:
        for row in islice(taken, most):
            held.add(row)
        found.more = next(taken, None) is not None
    except DataError as error:  # of the source: what is left cannot be read
        found.broken.add(str(error))
    held.compare(heldout, most)
    held.finish()
    return found


class _Held:
    """The pass: what it must remember of earlier rows."""

    def __init__(self, found: Sample, reading: Reading) -> None:
        self.found, self.reading = found, reading
        added, special = reading.tokenizer.added, reading.tokenizer.special
        self._named = {id for id in (*added.values(), special.pad, special.unk) if id is not None}
        self._first: dict[bytes, str] = {}
        self._prompts: dict[bytes, str] = {}
        self._format: dict[str, tuple[str, str]] = {}
        self._answers: list[tuple[int, str, str]] = []  # (characters, end, place)

    def add(self, row: Row) -> None:
        found = self.found
        found.rows += 1
        if (first := self._first.setdefault(_digest(row.values), row.where)) != row.where:
            found.duplicates.add(f"{row.where} is {first}")
        if "input_ids" in row.values:
            found.formats["tokenized"] += 1
            self._tokenized(row)
            return
        try:
            self._textual(row)
        except ArdorError as error:
            found.broken.add(str(error))

    def _textual(self, row: Row) -> None:
        found, reading = self.found, self.reading
        format = recognise(row.values, row.where)
        name, where = self._format.setdefault(row.file, (format.name, row.where))
        if name != format.name:
            raise DataError(
                f"{row.where} is in the format {format.name!r} but {where} is in {name!r}; keep "
                "one format per file"
            )
        found.formats[format.name] += 1
        try:
            content = format.read(row.values)
        except DataError as error:
            raise DataError(f"{row.where} ({format.name}): {error}") from error
        self._contents(content, row.where)
        if isinstance(content, Completion):
            self._boundary(content, row.where)
        examples = examples_of(
            row,
            reading.tokenizer,
            reading.template,
            preferences=reading.preferences,
            train_on=reading.train_on,
        )
        if not any(example.targets for example in examples):
            found.empty.add(row.where)
        for example in examples:
            self._example(example, row.where, content)

    def _contents(self, content: Content, place: str) -> None:
        """What the texts of a row hold, whoever wrote them."""
        found, tokenizer = self.found, self.reading.tokenizer
        texts = [*_texts(content)]
        found.characters += sum(len(text) for text, _ in texts)
        for text, is_answer in () if isinstance(content, Segments) else texts:
            if (token := tokenizer.control_in(text, tags=is_answer)) is not None:
                found.control.add(f"{place}: {token}")
                break
        if any("\ufffd" in text for text, _ in texts):
            found.replaced.add(place)
        prompts = [text for text, is_answer in texts if not is_answer]
        if prompts:
            self._prompts.setdefault(_digest(prompts), place)
        for text, is_answer in texts:
            if is_answer and text.strip():
                self._answers.append((len(text), text.rstrip()[-1], place))

    def _boundary(self, content: Completion, place: str) -> None:
        tokenizer = self.reading.tokenizer
        if content.prompt.endswith((" ", "\t")):
            self.found.spaced.add(place)
        joint = tokenizer.encode_content(content.prompt + content.completion, place="start")
        apart = tokenizer.encode_content(content.prompt, place="start")
        if joint[: len(apart)] != apart:
            self.found.merged.add(place)

    def _example(self, example: Example, place: str, content: Content) -> None:
        found, reading = self.found, self.reading
        special = reading.tokenizer.special
        found.lengths.append(len(example.tokens))
        found.targets += example.targets
        trained = [t for t, flag in zip(example.tokens, example.supervised, strict=True) if flag]
        if trained and trained[-1] not in reading.stops:
            open_ended = isinstance(content, Segments)
            told = found.open_ended if open_ended else found.unstopped
            told.add(f"{place}: {reading.tokenizer.token(trained[-1])!r}")
        long_text = isinstance(content, Text)  # is cut into pieces
        if not long_text and reading.limit is not None and len(example.tokens) > reading.limit:
            found.over.add(f"{place}: {len(example.tokens):,} tokens")
        self._ids(example.tokens, place)
        if special.unk is not None and special.unk not in reading.stops:
            count = example.tokens.count(special.unk)
            found.unknown_tokens += count
            if count:
                found.unknown.add(place)

    def _ids(self, tokens: Sequence[int], place: str) -> None:
        found, reading = self.found, self.reading
        for id in self._named.intersection(tokens):
            found.named.setdefault(id, Found()).add(place)
        if reading.vocab is not None and (high := max(tokens, default=0)) >= reading.vocab:
            found.outside.add(f"{place}: id {high}")

    def _tokenized(self, row: Row) -> None:
        """A row that other software has encoded: input_ids, and labels or all of them targets."""
        found, place, values = self.found, row.where, row.values
        ids, labels = values["input_ids"], values.get("labels", values["input_ids"])
        mask = values.get("attention_mask", [1] * len(ids) if _is_ids(ids) else None)
        if not (_is_ids(ids) and _is_ids(labels) and _is_ids(mask)):
            found.broken.add(f"{place}: input_ids, labels or attention_mask are no lists of ids")
            return
        if not len(ids) == len(labels) == len(mask):
            found.broken.add(
                f"{place}: {len(ids)} input_ids, {len(labels)} labels and {len(mask)} marks of "
                "attention; expected as many of each"
            )
            return
        kept = [i for i, marked in enumerate(mask) if marked]
        tokens, labels = [ids[i] for i in kept], [labels[i] for i in kept]
        found.lengths.append(len(tokens))
        if self.reading.limit is not None and len(tokens) > self.reading.limit:
            found.over.add(f"{place}: {len(tokens):,} tokens")
        self._ids(tokens, place)
        self._labels(tokens, labels, place)

    def _labels(self, tokens: list[int], labels: list[int], place: str) -> None:
        found, stops = self.found, self.reading.stops
        trained = [i for i, label in enumerate(labels) if label != IGNORED]
        found.targets += sum(i > 0 for i in trained)
        if not any(i > 0 for i in trained):
            found.empty.add(place)
            return
        same = sum(labels[i] == tokens[i] for i in trained)
        ahead = sum(i + 1 < len(tokens) and labels[i] == tokens[i + 1] for i in trained)
        if same < len(trained) and ahead >= max(1, len(trained) - 1):
            found.shifted.add(place)
            return
        if tokens[-1] in stops and labels[-1] == IGNORED:
            found.masked_ends.add(place)
        elif labels[trained[-1]] not in stops:
            token = self.reading.tokenizer.token(labels[trained[-1]])
            found.unstopped.add(f"{place}: {token!r}")

    def compare(self, heldout: Iterable[Row], most: int) -> None:
        """Which held-out rows, or their prompts, are among those that are trained on."""
        for row in islice(heldout, most):
            if (first := self._first.get(_digest(row.values))) is not None:
                self.found.leaked.add(f"{row.where} is {first}")
                continue
            try:
                content = recognise(row.values, row.where).read(row.values)
                prompts = [text for text, is_answer in _texts(content) if not is_answer]
            except ArdorError:  # told of by whoever reads it to evaluate
                continue
            if prompts and (first := self._prompts.get(_digest(prompts))) is not None:
                self.found.leaked_prompts.add(f"{row.where} asks as {first}")

    def finish(self) -> None:
        """Answers that a length limit has cut: many of the greatest length, ending in no end."""
        longest = max((length for length, _, _ in self._answers), default=0)
        for length, end, place in self._answers:
            if length == longest >= LONG and end not in ENDS:
                self.found.cut.add(place)


def _texts(content: Content) -> Iterator[tuple[str, bool]]:
    """Every text, and whether a model is to write it."""
    if isinstance(content, Text):
        yield content.text, False
    elif isinstance(content, Completion):
        yield content.prompt, False
        yield content.completion, True
    elif isinstance(content, Segments):
        yield from content.parts
    elif isinstance(content, Preference):
        yield from _texts(content.chosen)
        yield from ((text, True) for text, answers in _texts(content.rejected) if answers)
    else:
        for message in content.messages:
            if isinstance(message, Mapping) and isinstance(message.get("content"), str):
                yield message["content"], message.get("role") == "assistant"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(id) is int for id in value)


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()

"""Token sequences ready to train on, an account of how they came to be, and the one shift.

Axes: N tokens of one ragged row.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ardor.data.choices import OverLength, Preferences
from ardor.data.encode import Encoded, Encoder, marked
from ardor.data.formats import Conversation, conversation_examples
from ardor.data.lengths import Marked, keep_end, keep_start, pieces, policy_of
from ardor.data.readers import Row
from ardor.data.store import DTYPES, Arrays, MemoryStore, Store
from ardor.errors import ConfigError, DataError, ShapeError, TextError
from ardor.loss import IGNORE
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.example import Example
from ardor.text.tokenizer import Tokenizer

Progress = Callable[[int], None]  # called with how many rows are done
HASHED = 1 << 20  # tokens that the fingerprint looks at together


def shift(
    tokens: Int[Tensor, "N"],
    supervised: Bool[Tensor, "N"],
    lengths: tuple[int, ...] | None = None,
) -> Int[Tensor, "N"]:
    """What each position should predict: the token that follows it, or IGNORE.

    targets[t] = tokens[t + 1] where t + 1 is supervised and in the same document; the last
    position of a document predicts nothing, so a document's first token is never a target.
    `lengths` are those of the documents that lie end to end in the row (None: one document).

    Raises: ShapeError if the lengths do not add up to N.
    """
    lengths = (len(tokens),) if lengths is None else lengths
    if sum(lengths) != len(tokens) or len(supervised) != len(tokens):
        raise ShapeError(
            f"documents of {sum(lengths)} tokens and {len(supervised)} marks of supervision do "
            f"not cover a row of {len(tokens)} tokens"
        )
    targets = torch.full_like(tokens, IGNORE)
    targets[:-1] = tokens[1:].where(supervised[1:], IGNORE)
    ends = torch.tensor(lengths, device=tokens.device).cumsum(0) - 1
    targets[ends] = IGNORE
    return targets


_WORDS = {"unended": "without their end", "alike": "with two equal answers"}


@dataclass(frozen=True, slots=True)
class Census:
    """Where every row went. Counts are of examples, except where a name or comment says more."""

    rows: int = 0  # read
    examples: int = 0  # kept: sequences that will be trained on
    tokens: int = 0  # of kept examples
    targets: int = 0  # tokens that are predicted; the first of an example never is
    dropped: int = 0  # longer than max_length and left out
    truncated: int = 0  # kept without the start of their prompt, or without their end
    unended: int = 0  # of these, those whose last answer has lost its end, and so its stop token
    cut: int = 0  # documents kept as several examples, every token still predicted once
    empty: int = 0  # left out because they held no target, or rows that held no answer
    alike: int = 0  # pairs left out because both answers are the same
    longest: int = 0  # tokens of the longest example before the limit was applied
    formats: tuple[tuple[str, int], ...] = ()  # rows read in each format
    unread: tuple[str, ...] = ()  # columns that no format reads

    def summary(self) -> str:
        """One line, for a log."""
        kinds = ", ".join(name for name, _ in self.formats)
        line = f"{self.rows:,} rows{f' ({kinds})' if kinds else ''}: {self.examples:,} examples"
        line += f", {self.tokens:,} tokens, {self.targets:,} targets"
        for name in ("dropped", "truncated", "unended", "cut", "empty", "alike"):
            if count := getattr(self, name):
                line += f", {count:,} {_WORDS.get(name, name)}"
        return line

    def table(self) -> tuple[tuple[str, str], ...]:
        """(label, value) lines for people."""
        share = self.targets / self.tokens if self.tokens else 0.0
        lines = [
            ("rows", f"{self.rows:,}"),
            *((f"  as {name}", f"{count:,}") for name, count in self.formats),
            ("examples", f"{self.examples:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("targets", f"{self.targets:,} ({share:.0%} of tokens)"),
            ("longest example", f"{self.longest:,} tokens"),
            ("dropped, too long", f"{self.dropped:,}"),
            ("truncated", f"{self.truncated:,}"),
            ("  without their end", f"{self.unended:,}"),
            ("documents cut", f"{self.cut:,}"),
            ("left out, no targets", f"{self.empty:,}"),
        ]
        if self.alike:
            lines.append(("left out, two equal answers", f"{self.alike:,}"))
        if self.unread:
            lines.append(("columns not read", ", ".join(self.unread)))
        return tuple(lines)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples end to end in flat arrays, or a choice of them. Equal ones have equal fingerprints.

    The arrays may be mapped files: nothing here reads more of them than it is asked about.
    """

    tokens: np.ndarray  # int32, of all examples, chosen or not
    supervised: np.ndarray  # bool, as long
    starts: np.ndarray  # int64, where each begins: one more than there are
    rows: np.ndarray  # int64: the row that each example came from
    unended: np.ndarray  # bool: has the example lost its end to the length limit?
    census: Census
    bounds: tuple[int, ...] = (0,)  # the first row of each part of a mixture
    dtypes: ClassVar[Mapping[str, str]] = DTYPES  # of the arrays, where they are files
    chosen: np.ndarray | None = None  # int64: the examples of this dataset; None: all

    @classmethod
    def build(
        cls,
        rows: Iterable[Row],
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        max_length: int | None = None,
        over_length: OverLength = "drop",
        preferences: Preferences = "refuse",
        vocab: int | None = None,
        train_on: TrainOn = "all",
        progress: Progress | None = None,
        store: Store | None = None,
        fast: bool = True,
    ) -> "Dataset":
        """The examples of `rows`, none longer than `max_length` tokens (None: no limit).

        A text document that is longer is cut, except under "error": each piece starts with the
        last token of the one before, so that every token, the stop token too, is still predicted
        exactly once. Anything else that is longer is treated by `over_length`:

        - "drop": left out and counted.
        - "truncate_left": a conversation loses its first turns, but for system messages. Where its
          last turn alone is too long, and of a prompt, the start of the prompt is taken away, but
          for a BOS token; an earlier answer that this cuts into is no longer trained on. The last
          answer stays whole, with its stop token; where that leaves no prompt token the example is
          dropped and counted.
        - "truncate_right": loses its end. No stop token is put in the place of a lost one: the
          example is counted as without its end, and marked in `unended`; where that leaves no
          target it is dropped and counted.
        - "error": refused, naming the row.

        Of a conversation's answers `train_on` says which are trained on, where its messages do not.
        Examples with no target are left out and counted. A tokenizer may know added tokens that
        the model lacks: `vocab` are the ids that it has. Of `preferences` nothing is learnt, or
        the "chosen" answer. The arrays are collected in `store` (default: memory). `fast` False
        encodes row by row, to the same result.

        Raises: DataError naming the row that cannot be read or holds other ids, or if nothing is
        left to train on.
        """
        encoder = Encoder(
            tokenizer, template, preferences=preferences, train_on=train_on, fast=fast
        )
        builder = _Builder(
            max_length, over_length, tokenizer, template, train_on, store or MemoryStore()
        )
        for item in encoder(rows):
            builder.begin_row(item)
            for example in item.examples:
                if vocab is not None:
                    check_ids(example, vocab, item.row, tokenizer)
                builder.add(example, item)
            if progress:
                progress(builder.counts["rows"])
        return builder.finish()

    @classmethod
    def from_documents(
        cls,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> "Dataset":
        """Plain text to pre-train on: each document with its stop token, cut as in `build`.

        Raises: DataError if nothing is left to train on.
        """
        rows = (Row({"text": text}, f"document {i}") for i, text in enumerate(texts, 1))
        return cls.build(rows, tokenizer, max_length=max_length, progress=progress)

    @classmethod
    def of(cls, arrays: Arrays, census: Census, bounds: tuple[int, ...] = (0,)) -> "Dataset":
        """The dataset of what a store has collected."""
        starts = np.concatenate([[0], arrays.lengths.cumsum()])
        return cls(
            arrays.tokens, arrays.supervised, starts, arrays.rows, arrays.unended, census, bounds
        )

    def __len__(self) -> int:
        return len(self.rows if self.chosen is None else self.chosen)

    def __getitem__(self, index: int) -> Example:
        span = self.span(index)
        return Example(tuple(self.tokens[span].tolist()), tuple(self.supervised[span].tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dataset) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def span(self, index: int) -> slice:
        """Where an example lies in the flat arrays."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        which = index if self.chosen is None else int(self.chosen[index])
        return slice(int(self.starts[which]), int(self.starts[which + 1]))

    def documents(self, index: int) -> tuple[int, ...]:
        """Tokens of each document of an example: it is one, except where answers are compared."""
        span = self.span(index)
        return (span.stop - span.start,)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self._pick(np.diff(self.starts))

    @cached_property
    def row_of(self) -> np.ndarray:
        """The row that each example came from, int64."""
        return self._pick(self.rows)

    @cached_property
    def part_of(self) -> np.ndarray:
        """The part of the mixture that each example is from, int64."""
        return np.searchsorted(self.bounds, self.row_of, side="right") - 1

    def _pick(self, values: np.ndarray) -> np.ndarray:
        return values if self.chosen is None else values[self.chosen]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every token, border and mark of supervision.

        A run records it, and refuses to resume with other data.
        """
        digest = hashlib.sha256(b"ardor dataset 1")
        digest.update(np.concatenate([[0], self.lengths.cumsum()]).astype("<i8").tobytes())
        for values, kind in ((self.tokens, "<i4"), (self.supervised, "|b1")):
            for start, stop in self._runs():
                for at in range(start, stop, HASHED):
                    part = values[at : min(at + HASHED, stop)]
                    digest.update(np.ascontiguousarray(part, dtype=kind).tobytes())
        return digest.hexdigest()

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Stretches of the flat arrays that hold the examples, in order."""
        if self.chosen is None:
            yield 0, int(self.starts[-1])
            return
        breaks = np.flatnonzero(np.diff(self.chosen) != 1) + 1
        for run in np.split(self.chosen, breaks):
            yield int(self.starts[run[0]]), int(self.starts[run[-1] + 1])

    def split(self, fraction: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """(training, held-out) datasets; about `fraction` of the rows are held out.

        All examples of a row go to the same side: pieces of one document are alike, and the turns
        of one conversation repeat each other. Of a lone document that was cut its end is held out.

        Raises: DataError if the fraction is not between 0 and 1 or there are fewer than two rows.
        """
        rows = np.unique(self.row_of)
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
        if len(rows) < 2 and self.census.cut:
            held = min(max(1, round(fraction * len(self))), len(self) - 1)
            heldout = np.arange(len(self)) >= len(self) - held
            return self._select(~heldout), self._select(heldout)
        if len(rows) < 2:
            raise DataError("a dataset with one row cannot be split; give a held-out file instead")
        held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        heldout = np.isin(self.row_of, rows[permutation(len(rows), seed)[:held]])
        return self._select(~heldout), self._select(heldout)

    def _select(self, keep: np.ndarray) -> "Dataset":
        chosen = np.flatnonzero(keep) if self.chosen is None else self.chosen[keep]
        made = replace(self, chosen=chosen)
        targets = 0
        for start, stop in made._runs():
            targets += int(np.count_nonzero(self.supervised[start:stop]))
        census = Census(
            rows=len(np.unique(made.row_of)),
            examples=len(chosen),
            tokens=int(made.lengths.sum()),
            # The first token of an example is never a target.
            targets=targets - int(np.count_nonzero(self.supervised[self.starts[chosen]])),
            unended=int(np.count_nonzero(self.unended[chosen])),
            longest=int(made.lengths.max()),
        )
        return replace(made, census=census)


def permutation(count: int, *seeds: int) -> np.ndarray:
    """A shuffled range(count), the same on every machine and with every version of NumPy.

    Raw bits are used because only they are promised never to change.
    Source: NEP 19, which lets the methods of Generator change but not the bit streams.
    """
    words = [seed % 2**64 for seed in seeds]  # a seed may be negative
    keys = np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)
    return np.argsort(keys, kind="stable")


def check_ids(example: Marked, vocab: int, row: Row, tokenizer: Tokenizer) -> None:
    if (high := int(example.tokens.max(initial=0))) >= vocab:
        raise DataError(
            f"{row.where} holds token {tokenizer.token(high)!r}, id {high}, but the "
            f"model has only {vocab} ids; take it out of the data"
        )


@dataclass
class _Builder:
    limit: int | None
    over_length: OverLength
    tokenizer: Tokenizer
    template: ChatTemplate | None
    train_on: TrainOn
    store: Store
    counts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)
    bounds: list[int] = field(default_factory=list)
    first_of_file: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"max_length is {self.limit}; predicting one token takes at least 2")
        self.policy = policy_of(self.over_length)

    def begin_row(self, item: Encoded) -> None:
        """Count a row.

        Raises: DataError if it is in another format than those before it in its file.
        """
        row, format = item.row, item.format
        kind = format.name
        if kind in ("prompt-completion", "preference"):
            kind += " of " + ("messages" if isinstance(item.content, Conversation) else "strings")
        first, where = self.first_of_file.setdefault(row.file, (kind, row.where))
        if first != kind:
            raise DataError(
                f"{row.where} is in the format {kind!r} but {where} is in {first!r}; "
                "keep one format per file"
            )
        while len(self.bounds) <= row.part:
            self.bounds.append(self.counts["rows"])
        self.counts["rows"] += 1
        self.formats[format.name] += 1
        self.unread.update(format.unread(row.values))
        self.counts["empty"] += not item.examples

    def add(self, example: Marked, item: Encoded) -> None:
        """Keep an example, or what the limit leaves of it."""
        size = len(example.tokens)
        if example.targets:
            self.counts["longest"] = max(self.counts["longest"], size)
        if not example.targets or self.limit is None or size <= self.limit:
            self._keep(example)
        elif self.policy == "error":
            raise DataError(
                f"{item.row.where} makes an example of {size} tokens, longer than max_length="
                f"{self.limit}; raise max_length, or choose over_length drop, truncate_left or "
                "truncate_right"
            )
        elif item.format.name == "text":
            self.counts["cut"] += 1
            for piece in pieces(example, self.limit):
                self._keep(piece)
        else:
            self._shorten(example, item, self.limit)

    def _shorten(self, example: Marked, item: Encoded, limit: int) -> None:
        shorter, unended = None, False
        if self.policy == "truncate_left":
            if len(item.examples) == 1 and isinstance(item.content, Conversation):
                shorter = _fewer_turns(
                    item.content, limit, self.tokenizer, self.template, self.train_on
                )
            shorter = shorter or keep_end(example, limit, self.tokenizer.special.bos)
        elif self.policy == "truncate_right" and (found := keep_start(example, limit)):
            shorter, unended = found
        self.counts["truncated" if shorter else "dropped"] += 1
        self.counts["unended"] += unended
        if shorter:
            self._keep(shorter, unended)

    def _keep(self, example: Marked, unended: bool = False) -> None:
        targets = example.targets
        if not targets:
            self.counts["empty"] += 1
            return
        self.store.append(*example, row=self.counts["rows"] - 1, unended=unended)
        self.counts["targets"] += targets
        self.counts["tokens"] += len(example.tokens)
        self.counts["examples"] += 1

    def finish(self) -> Dataset:
        """The dataset.

        Raises: DataError if it holds nothing to train on.
        """
        census = Census(
            **self.counts,
            formats=tuple(self.formats.items()),
            unread=tuple(sorted(self.unread)),
        )
        if not census.targets:
            raise DataError(f"nothing is trained on: {self._nothing(census)}")
        return Dataset.of(self.store.finish(), census, tuple(self.bounds))

    def _nothing(self, census: Census) -> str:
        if not census.rows:
            return "there are no rows"
        if census.dropped:
            found = (
                f"{census.dropped:,} of {census.rows:,} rows were dropped as longer than "
                f"max_length={self.limit} (the longest has {census.longest:,} tokens); "
                "raise max_length"
            )
            if self.policy == "truncate_left":
                return f"{found}: prompts lose their start, but an answer is never cut"
            return f"{found}, or set over_length=truncate_left to shorten prompts"
        return (
            f"none of the {census.rows:,} rows holds an answer or a text with something to "
            "predict; check that messages have an assistant turn and that the answer column is "
            "not blank"
        )


def _fewer_turns(
    conversation: Conversation,
    limit: int,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn,
) -> Marked | None:
    """The conversation without its first turns, as few of them as must go; None if all must.

    A turn begins with a user's message; system messages before the first one stay.
    """
    messages = conversation.messages
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        return None

    def without(turns: int) -> Marked | None:
        kept = (*messages[: users[0]], *messages[users[turns] :])
        given = max(0, conversation.given - (users[turns] - users[0]))
        shorter = replace(conversation, messages=kept, given=given)
        try:
            found = conversation_examples(shorter, tokenizer, template, train_on)
        except TextError:  # a template that wants its first turns, or no answer is left
            return None
        fits = len(found) == 1 and len(found[0].tokens) <= limit
        return marked(found[0]) if fits else None

    fewest, most, best = 1, len(users) - 1, None
    while fewest <= most:  # what fits with so many turns gone also fits with more of them gone
        middle = (fewest + most) // 2
        if (found := without(middle)) is not None:
            best, most = found, middle - 1
        else:
            fewest = middle + 1
    return best

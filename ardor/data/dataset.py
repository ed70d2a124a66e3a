"""Token sequences ready to train on, an account of how they came to be, and the one shift.

Axes: N tokens of one ragged row.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ardor.data.formats import Format, examples_of, recognise
from ardor.data.sources import Row
from ardor.errors import ConfigError, DataError, ShapeError
from ardor.loss import IGNORE
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.example import Example
from ardor.text.tokenizer import Tokenizer

OverLength = Literal["drop", "truncate", "error"]
Progress = Callable[[int], None]  # called with how many rows are done


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


@dataclass(frozen=True, slots=True)
class Census:
    """Where every row went. Counts are of examples, except where a name or comment says more."""

    rows: int = 0  # read
    examples: int = 0  # kept: sequences that will be trained on
    tokens: int = 0  # of kept examples
    targets: int = 0  # tokens that are predicted; the first of an example never is
    dropped: int = 0  # longer than max_length and left out
    truncated: int = 0  # kept without the start of their prompt
    cut: int = 0  # documents kept as several examples, every token still predicted once
    empty: int = 0  # left out because they held no target, or rows that held no answer
    longest: int = 0  # tokens of the longest example before the limit was applied
    formats: tuple[tuple[str, int], ...] = ()  # rows read in each format
    unread: tuple[str, ...] = ()  # columns that no format reads

    def summary(self) -> str:
        """One line, for a log."""
        kinds = ", ".join(name for name, _ in self.formats)
        line = f"{self.rows:,} rows{f' ({kinds})' if kinds else ''}: {self.examples:,} examples"
        line += f", {self.tokens:,} tokens, {self.targets:,} targets"
        for name in ("dropped", "truncated", "cut", "empty"):
            if count := getattr(self, name):
                line += f", {count:,} {name}"
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
            ("prompts truncated", f"{self.truncated:,}"),
            ("documents cut", f"{self.cut:,}"),
            ("left out, no targets", f"{self.empty:,}"),
        ]
        if self.unread:
            lines.append(("columns not read", ", ".join(self.unread)))
        return tuple(lines)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples end to end in flat arrays. Equal datasets have equal fingerprints."""

    tokens: np.ndarray  # int32, of all examples
    supervised: np.ndarray  # bool, as long
    starts: np.ndarray  # int64, one more than there are examples
    rows: np.ndarray  # int32: the row that each example came from
    census: Census

    @classmethod
    def build(
        cls,
        rows: Iterable[Row],
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        max_length: int | None = None,
        over_length: OverLength = "drop",
        vocab: int | None = None,
        train_on: TrainOn = "all",
        progress: Progress | None = None,
    ) -> "Dataset":
        """The examples of `rows`, none longer than `max_length` tokens (None: no limit).

        A text document that is longer is cut, except under "error": each piece starts with the
        last token of the one before, so that every token, the stop token too, is still predicted
        exactly once. Anything else that is longer is treated by `over_length`:

        - "drop": left out and counted.
        - "truncate": the start of its prompt is taken away, but for a BOS token; an earlier
          answer that this cuts into is no longer trained on. The last answer stays whole, with
          its stop token; where that leaves no prompt token the example is dropped and counted.
        - "error": refused, naming the row.

        Of a conversation's answers `train_on` says which are trained on, where its messages do not.
        Examples with no target are left out and counted. A tokenizer may know added tokens that
        the model lacks: `vocab` are the ids that it has.

        Raises: DataError naming the row that cannot be read or holds other ids, or if nothing is
        left to train on.
        """
        builder = _Builder(max_length, over_length, tokenizer.special.bos)
        first_of_file: dict[str, tuple[Format, str]] = {}
        for row in rows:
            format = recognise(row.values, row.where)
            first, where = first_of_file.setdefault(row.file, (format, row.where))
            if first is not format:
                raise DataError(
                    f"{row.where} is in the format {format.name!r} but {where} is in "
                    f"{first.name!r}; keep one format per file"
                )
            builder.begin_row(format.name, format.unread(row.values))
            examples = examples_of(row, tokenizer, template, train_on)
            builder.counts["empty"] += not examples
            for example in examples:
                if vocab is not None and (high := max(example.tokens, default=0)) >= vocab:
                    raise DataError(
                        f"{row.where} holds token {tokenizer.token(high)!r}, id {high}, but the "
                        f"model has only {vocab} ids; take it out of the data"
                    )
                if format.name == "text":
                    builder.add_document(example, row.where)
                else:
                    builder.add(example, row.where)
            if progress:
                progress(builder.counts["rows"])
        return cls._finish(builder)

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
    def _finish(cls, builder: "_Builder") -> "Dataset":
        census = builder.census()
        if not census.targets:
            raise DataError(f"nothing is trained on: {_nothing(census, builder)}")
        return cls(
            np.array(builder.tokens, dtype=np.int32),
            np.frombuffer(bytes(builder.supervised), dtype=np.bool_),
            np.array(builder.starts, dtype=np.int64),
            np.array(builder.rows, dtype=np.int32),
            census,
        )

    def __len__(self) -> int:
        return len(self.rows)

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
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every token, border and mark of supervision.

        A run records it, and refuses to resume with other data.
        """
        digest = hashlib.sha256(b"ardor dataset 1")
        for values, kind in ((self.starts, "<i8"), (self.tokens, "<i4"), (self.supervised, "|b1")):
            digest.update(np.ascontiguousarray(values, dtype=kind).tobytes())
        return digest.hexdigest()

    def split(self, fraction: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """(training, held-out) datasets; about `fraction` of the rows are held out.

        All examples of a row go to the same side: pieces of one document are alike, and the turns
        of one conversation repeat each other. Of a lone document that was cut its end is held out.

        Raises: DataError if the fraction is not between 0 and 1 or there are fewer than two rows.
        """
        rows = np.unique(self.rows)
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
        if len(rows) < 2 and self.census.cut:
            held = min(max(1, round(fraction * len(self))), len(self) - 1)
            heldout = np.arange(len(self)) >= len(self) - held
            return self._select(~heldout), self._select(heldout)
        if len(rows) < 2:
            raise DataError("a dataset with one row cannot be split; give a held-out file instead")
        held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        heldout = np.isin(self.rows, rows[permutation(len(rows), seed)[:held]])
        return self._select(~heldout), self._select(heldout)

    def _select(self, keep: np.ndarray) -> "Dataset":
        lengths, of_token = self.lengths[keep], np.repeat(keep, self.lengths)
        starts = np.concatenate([[0], lengths.cumsum()])
        supervised = self.supervised[of_token]
        census = Census(
            rows=len(np.unique(self.rows[keep])),
            examples=len(lengths),
            tokens=int(starts[-1]),
            targets=int(supervised.sum() - supervised[starts[:-1]].sum()),
            longest=int(lengths.max()),
        )
        return Dataset(self.tokens[of_token], supervised, starts, self.rows[keep], census)


def permutation(count: int, *seeds: int) -> np.ndarray:
    """A shuffled range(count), the same on every machine and with every version of NumPy.

    Raw bits are used because only they are promised never to change.
    Source: NEP 19, which lets the methods of Generator change but not the bit streams.
    """
    words = [seed % 2**64 for seed in seeds]  # a seed may be negative
    keys = np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)
    return np.argsort(keys, kind="stable")


@dataclass
class _Builder:
    limit: int | None
    policy: OverLength
    bos: int | None
    tokens: array = field(default_factory=lambda: array("i"))
    supervised: bytearray = field(default_factory=bytearray)
    starts: array = field(default_factory=lambda: array("q", [0]))
    rows: array = field(default_factory=lambda: array("i"))
    counts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"max_length is {self.limit}; predicting one token takes at least 2")
        if self.policy not in get_args(OverLength):
            raise ConfigError(
                f"over_length is {self.policy!r}; choose from {', '.join(get_args(OverLength))}"
            )

    def begin_row(self, format: str, unread: Iterable[str]) -> None:
        self.counts["rows"] += 1
        self.formats[format] += 1
        self.unread.update(unread)

    def add_document(self, example: Example, where: str) -> None:
        if self.limit is None or self._fits(example, where):
            self._keep(example)
            return
        self.counts["cut"] += 1
        for piece in _pieces(example, self.limit):
            self._keep(piece)

    def add(self, example: Example, where: str) -> None:
        if not example.targets or self.limit is None or self._fits(example, where):
            self._keep(example)
            return
        shorter = _keep_answer(example, self.limit, self.bos) if self.policy == "truncate" else None
        self.counts["truncated" if shorter else "dropped"] += 1
        if shorter:
            self._keep(shorter)

    def _fits(self, example: Example, where: str) -> bool:
        count = len(example.tokens)
        self.counts["longest"] = max(self.counts["longest"], count)
        if self.limit is None or count <= self.limit:
            return True
        if self.policy == "error":
            raise DataError(
                f"{where} makes an example of {count} tokens, longer than max_length="
                f"{self.limit}; raise max_length, or choose over_length drop or truncate"
            )
        return False

    def _keep(self, example: Example) -> None:
        targets = example.targets
        if not targets:
            self.counts["empty"] += 1
            return
        self.tokens.extend(example.tokens)
        self.supervised.extend(example.supervised)
        self.starts.append(len(self.tokens))
        self.rows.append(self.counts["rows"] - 1)
        self.counts["targets"] += targets
        self.counts["longest"] = max(self.counts["longest"], len(example.tokens))

    def census(self) -> Census:
        return Census(
            **self.counts,
            examples=len(self.rows),
            tokens=len(self.tokens),
            formats=tuple(self.formats.items()),
            unread=tuple(sorted(self.unread)),
        )


def _pieces(example: Example, limit: int) -> Iterable[Example]:
    """Runs of at most `limit` tokens, each starting on the last token of the one before."""
    for start in range(0, len(example.tokens) - 1, limit - 1):
        stop = start + limit
        yield Example(example.tokens[start:stop], example.supervised[start:stop])


def _keep_answer(example: Example, limit: int, bos: int | None) -> Example | None:
    """The end of the example that fits, with its last answer whole; None if there is no such.

    What follows the last answer teaches nothing and goes first. A BOS token stays in front: models
    put attention there that has nowhere else to go.
    """
    stop = len(example.tokens)
    while not example.supervised[stop - 1]:
        stop -= 1
    answer = stop - 1
    while answer and example.supervised[answer - 1]:
        answer -= 1
    if stop <= limit:
        return Example(example.tokens[:stop], example.supervised[:stop])
    head = 1 if bos is not None and example.tokens[0] == bos else 0
    start = stop - (limit - head)
    if start >= answer:
        return None
    # An answer that the piece begins with has lost its start, or all of its prompt.
    cut = example.supervised.index(False, start)
    supervised = (False,) * (head + cut - start) + example.supervised[cut:stop]
    return Example(example.tokens[:head] + example.tokens[start:stop], supervised)


def _nothing(census: Census, builder: _Builder) -> str:
    if not census.rows:
        return "there are no rows"
    if census.dropped:
        found = (
            f"{census.dropped:,} of {census.rows:,} rows were dropped as longer than max_length="
            f"{builder.limit} (the longest has {census.longest:,} tokens); raise max_length"
        )
        if builder.policy == "truncate":
            return f"{found}: prompts lose their start, but an answer is never cut"
        return f"{found}, or set over_length=truncate to shorten prompts"
    return (
        f"none of the {census.rows:,} rows holds an answer or a text with something to predict; "
        "check that messages have an assistant turn and that the answer column is not blank"
    )

"""Answers that people have judged: pairs of which one is better, or answers that are liked or not.

An example holds two documents end to end. Of a pair they are the chosen and the rejected answer,
each after the prompt; of a labelled answer they are the answer, and the prompt with the answer to
another one, by which KTO measures how far the model has moved.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from ardor.data.choices import OverLength
from ardor.data.dataset import Census, Dataset, Progress, check_ids
from ardor.data.encode import marked
from ardor.data.formats import Conversation, encoded, explained, preference_sides, read
from ardor.data.lengths import Marked, keep_start, policy_of
from ardor.data.readers import Row
from ardor.data.store import JUDGED_DTYPES, Arrays, MemoryStore, Store
from ardor.errors import DataError, TextError
from ardor.text.chat import ChatTemplate
from ardor.text.tokenizer import Tokenizer

Kind = Literal["pairs", "labels"]
PAIR = ("chosen", "rejected")
LABEL = "label"
_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, eq=False)
class Judged(Dataset):
    """Examples of two documents each, and whether their first one is liked."""

    firsts: np.ndarray | None = None  # int64: tokens of the first document of each
    liked: np.ndarray | None = None  # bool; of a pair always
    dtypes: ClassVar[Mapping[str, str]] = JUDGED_DTYPES

    @classmethod
    def of(cls, arrays: Arrays, census: Census, bounds: tuple[int, ...] = (0,)) -> "Judged":
        """The dataset of what a store of judged examples has collected."""
        made = super().of(arrays, census, bounds)
        assert isinstance(made, cls)
        return replace(made, firsts=arrays.firsts, liked=arrays.liked)

    def documents(self, index: int) -> tuple[int, ...]:
        span, which = self.span(index), index if self.chosen is None else int(self.chosen[index])
        assert self.firsts is not None
        first = int(self.firsts[which])
        return first, span.stop - span.start - first

    def likes(self, index: int) -> bool:
        assert self.liked is not None
        return bool(self.liked[index if self.chosen is None else self.chosen[index]])

    @cached_property
    def fingerprint(self) -> str:
        """That of the tokens, with the borders within examples and the labels."""
        assert self.firsts is not None and self.liked is not None
        text = hashlib.sha256(super().fingerprint.encode())
        text.update(self._pick(self.firsts).astype("<i8").tobytes())
        text.update(self._pick(self.liked).astype("|b1").tobytes())
        return text.hexdigest()


def check_columns(row: Row, kind: Kind) -> None:
    """Raises: DataError for a row that holds no judgement of the kind."""
    found = ", ".join(row.values) or "(none)"
    if all(column in row.values for column in PAIR):
        return
    if kind == "pairs":
        other = (
            "for single answers with a label choose --objective kto"
            if LABEL in row.values
            else "to train on single answers leave --objective out"
        )
        raise DataError(
            f"{row.where}: found the columns {found}; expected chosen and rejected (and prompt), "
            f"two answers of which the first is better; {other}"
        )
    if LABEL not in row.values:
        raise DataError(
            f"{row.where}: found the columns {found}; expected prompt, completion and label (true: "
            "a good answer, false: a bad one), or chosen and rejected; to train on answers without "
            "labels leave --objective out"
        )


def build_judged(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    kind: Kind,
    *,
    max_length: int,
    over_length: OverLength = "truncate_left",
    vocab: int | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Judged:
    """The judged answers of `rows`, each document at most `max_length` tokens.

    For labels a pair counts as two answers, one liked and one not. `truncate_left` takes the same
    tokens from the start of both prompts of a pair, never from an answer; `truncate_right` takes
    the ends of answers. Pairs with two equal answers, and rows with a blank answer, are left out
    and counted. The arrays are collected in `store`, made for `Judged.dtypes` (default: memory).

    Raises: DataError naming the row that cannot be read, or if nothing is left.
    """
    store = store or MemoryStore(Judged.dtypes)
    builder = _Builder(tokenizer, template, kind, max_length, over_length, vocab, store)
    for row in rows:
        builder.take(row)
        if progress:
            progress(builder.counts["rows"])
    return builder.finish()


class _Builder:
    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        kind: Kind,
        limit: int,
        over_length: OverLength,
        vocab: int | None,
        store: Store,
    ) -> None:
        self.tokenizer, self.template, self.kind = tokenizer, template, kind
        self.limit, self.policy, self.vocab = limit, policy_of(over_length), vocab
        self.counts: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.bounds: list[int] = []
        self.store = store
        # The second document of a labelled answer is made of two examples, once all are there.
        self.kept = store if kind == "pairs" else store.scratch()

    def take(self, row: Row) -> None:
        check_columns(row, self.kind)
        while len(self.bounds) <= row.part:
            self.bounds.append(self.counts["rows"])
        self.counts["rows"] += 1
        if all(column in row.values for column in PAIR):
            self._take_pair(row)
        else:
            self._take_answer(row)

    def _take_pair(self, row: Row) -> None:
        self.formats["preference"] += 1
        sides = preference_sides(row, self.tokenizer, self.template)
        if not all(sides):
            self.counts["empty"] += 1
            return
        better, worse = (marked(side[-1]) for side in sides)
        if self._alike(better, worse):
            return
        if self.kind == "labels":
            for side, liked in ((better, True), (worse, False)):
                if found := self._fitted(row, side):
                    self._keep(found[0], liked, found[1])
        elif found := self._fitted(row, better, worse):
            (better, worse), unended = found
            if not self._alike(better, worse):
                self._keep([better, worse], True, unended)

    def _alike(self, better: Marked, worse: Marked) -> bool:
        same = np.array_equal(better.tokens, worse.tokens)
        self.counts["alike"] += same
        return same

    def _take_answer(self, row: Row) -> None:
        format, content = read(row)
        self.formats[f"{format.name} with labels"] += 1
        value = row.values[LABEL]
        liked = value if isinstance(value, bool) else _LABELS.get(str(value).strip().lower())
        if liked is None:
            raise DataError(f"{row.where}: label is {value!r}; expected true or false")
        # Of a conversation the last answer is what was judged.
        given = isinstance(content, Conversation) and content.given
        try:
            examples = encoded(content, self.tokenizer, self.template, "all" if given else "last")
        except (DataError, TextError) as error:
            raise explained(row, format, error) from error
        if not examples:
            self.counts["empty"] += 1
        elif found := self._fitted(row, marked(examples[-1])):
            self._keep(found[0], liked, found[1])

    def _fitted(self, row: Row, *sides: Marked) -> tuple[list[Marked], bool] | None:
        """The documents as the limit leaves them, and whether an end is lost; None: dropped."""
        if self.vocab is not None:
            for side in sides:
                check_ids(side, self.vocab, row, self.tokenizer)
        longest = max(len(side.tokens) for side in sides)
        self.counts["longest"] = max(self.counts["longest"], longest)
        if not all(side.targets for side in sides):
            self.counts["empty"] += 1
            return None
        if longest <= self.limit:
            return [*sides], False
        if self.policy == "error":
            raise DataError(
                f"{row.where} makes a document of {longest} tokens, longer than max_length="
                f"{self.limit}; raise max_length, or choose over_length drop, truncate_left or "
                "truncate_right"
            )
        found = None
        if self.policy == "truncate_left":
            found = _without_start(sides, longest - self.limit, self.tokenizer.special.bos)
        elif self.policy == "truncate_right":
            found = _without_end(sides, self.limit)
        self.counts["truncated" if found else "dropped"] += 1
        self.counts["unended"] += found is not None and found[1]
        return found

    def _keep(self, documents: list[Marked], liked: bool, unended: bool) -> None:
        self.counts["examples"] += 1
        row = self.counts["rows"] - 1
        self._append(self.kept, documents, row=row, unended=unended, liked=liked)

    def _append(self, store: Store, documents: list[Marked], **about: Any) -> None:
        tokens = np.concatenate([one.tokens for one in documents])
        supervised = np.concatenate([one.supervised for one in documents])
        store.append(tokens, supervised, firsts=len(documents[0].tokens), **about)
        if store is self.store:
            self.counts["tokens"] += len(tokens)
            self.counts["targets"] += sum(one.targets for one in documents)

    def finish(self) -> Judged:
        if not self.counts["examples"]:
            raise DataError(
                f"nothing is left to learn from {self.counts['rows']:,} rows: "
                f"{self.counts['dropped']:,} too long, {self.counts['empty']:,} without an answer, "
                f"{self.counts['alike']:,} with two equal answers"
            )
        if self.kept is not self.store:
            self._complete(self.kept.finish())
        counts: dict[str, Any] = dict(self.counts)
        census = Census(**counts, formats=tuple(self.formats.items()))
        return Judged.of(self.store.finish(), census, tuple(self.bounds))

    def _complete(self, answers: Arrays) -> None:
        """Every answer with its prompt, and the prompt with the answer to another one."""
        assert answers.liked is not None
        starts = np.concatenate([[0], answers.lengths.cumsum()])

        def answer(index: int) -> Marked:
            span = slice(int(starts[index]), int(starts[index + 1]))
            return Marked(answers.tokens[span], answers.supervised[span])

        count = len(answers.rows)
        prompts = [_prompt(answer(index)) for index in range(count)]
        if len({*prompts}) == 1:
            raise DataError(
                f"all {count:,} labelled answers are to one prompt, and kto measures how "
                "far the model has moved by answers to other prompts; give rows of at least two"
            )
        for index in range(count):
            own = answer(index)
            # From the other half of the data, as neighbours often answer the same prompt.
            order = ((index + count // 2 + step) % count for step in range(count))
            other = answer(next(place for place in order if prompts[place] != prompts[index]))
            self._append(
                self.store,
                [own, _elsewhere(own, other, self.limit)],
                row=int(answers.rows[index]),
                unended=bool(answers.unended[index]),
                liked=bool(answers.liked[index]),
            )


def _elsewhere(own: Marked, other: Marked, limit: int) -> Marked:
    """The prompt of an answer, followed by the answer to another prompt."""
    at, start = (int(np.argmax(one.supervised)) for one in (own, other))
    tokens = np.concatenate([own.tokens[:at], other.tokens[start:]])
    supervised = np.concatenate([own.supervised[:at], other.supervised[start:]])
    return Marked(tokens, supervised).part(0, max(limit, at + 1))


def _prompt(answer: Marked) -> bytes:
    """What tells the prompt of an answer from others, and is short."""
    prompt = answer.tokens[: int(np.argmax(answer.supervised))]
    return hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()


def _without_start(
    sides: tuple[Marked, ...], cut: int, bos: int | None
) -> tuple[list[Marked], bool] | None:
    """`cut` tokens less of the prompt of each side, after a BOS; None if no prompt were left."""
    head = 1 if bos is not None and sides[0].tokens[0] == bos else 0
    if any(int(np.argmax(side.supervised)) <= head + cut for side in sides):
        return None
    gone = slice(head, head + cut)
    return [
        Marked(np.delete(side.tokens, gone), np.delete(side.supervised, gone)) for side in sides
    ], False


def _without_end(sides: tuple[Marked, ...], limit: int) -> tuple[list[Marked], bool] | None:
    found = list(_starts(sides, limit))
    if len(found) < len(sides):
        return None
    return [side for side, _ in found], any(unended for _, unended in found)


def _starts(sides: tuple[Marked, ...], limit: int) -> Iterator[tuple[Marked, bool]]:
    for side in sides:
        short = (side, False) if len(side.tokens) <= limit else keep_start(side, limit)
        if short:
            yield short

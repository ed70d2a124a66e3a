"""Documents of a batch as people see them: token by token, and which of them are trained on.

Nothing here makes rows: what is marked as trained on is what has a target in the trainer's batch.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from ardor.data.batches import Batch
from ardor.data.dataset import Dataset
from ardor.data.visible import visible_parts
from ardor.loss import IGNORE
from ardor.text.stream import StreamDecoder
from ardor.text.tokenizer import Tokenizer

Kind = Literal["text", "control", "gap"]


@dataclass(frozen=True)
class Cell:
    """One token, or several that make one character; a gap says how many are not shown."""

    ids: tuple[int, ...]
    text: str
    position: int  # of the first of them, in its document
    kind: Kind
    trained: bool
    stop: bool  # ends a generation


@dataclass(frozen=True)
class Document:
    where: str  # the row of the data: "pairs.jsonl:17"
    part: str  # "", or which of the row's documents this is: "example 2 of 3", "chosen"
    cells: tuple[Cell, ...]
    tokens: int
    targets: int
    trained: tuple[tuple[int, int], ...]  # first and last position of each run that is trained on
    ends: bool  # whether a stop token is trained on

    @property
    def shown(self) -> list[tuple[Cell, str]]:
        """Each cell with its text made visible; what is trained on is a text of its own."""
        pairs: list[tuple[Cell, str]] = []
        for _, group in groupby(self.cells, key=lambda cell: (cell.kind, cell.trained)):
            cells = list(group)
            pairs += zip(cells, visible_parts([cell.text for cell in cells]), strict=True)
        return pairs

    def shortened(self, most: int) -> "Document":
        """With `most` cells at most, and a gap between the first and the last of them."""
        if len(self.cells) <= most:
            return self
        tail = most // 2
        head, gone = self.cells[: most - tail], self.cells[most - tail : -tail]
        tokens = sum(len(cell.ids) for cell in gone)
        gap = Cell((), f" … {tokens:,} tokens … ", gone[0].position, "gap", False, False)
        return replace(self, cells=(*head, gap, *self.cells[-tail:]))


def document(
    batch: Batch, place: int, tokenizer: Tokenizer, stops: Collection[int], where: str, part: str
) -> Document:
    """The document at `place` of a batch, from the row that `where` and `part` name."""
    start = sum(batch.lengths[:place])
    stop = start + batch.lengths[place]
    tokens = batch.tokens[0, start:stop].tolist()
    # The position before a token is the one that is to predict it.
    targets = [IGNORE, *batch.targets[0, start : stop - 1].tolist()]
    marks = [target != IGNORE for target in targets]
    cells = tuple(_cells(tokens, marks, tokenizer, stops))
    return Document(
        where=where,
        part=part,
        cells=cells,
        tokens=len(tokens),
        targets=sum(marks),
        trained=tuple(_runs(marks)),
        ends=any(cell.trained and cell.stop for cell in cells),
    )


def part_of(dataset: Dataset, example: int) -> str:
    """Which of its row's examples this is; "" where it is the only one."""
    siblings = (dataset.row_of == dataset.row_of[example]).nonzero()[0].tolist()
    return f"example {siblings.index(example) + 1} of {len(siblings)}" if siblings[1:] else ""


def _runs(marks: list[bool]) -> Iterator[tuple[int, int]]:
    for marked, group in groupby(enumerate(marks), key=lambda pair: pair[1]):
        positions = [position for position, _ in group]
        if marked:
            yield positions[0], positions[-1]


def _cells(
    tokens: list[int], trained: list[bool], tokenizer: Tokenizer, stops: Collection[int]
) -> Iterator[Cell]:
    """The tokens as text; those of half a character wait for the rest of it."""
    decoder, held, ends = StreamDecoder(tokenizer), list[int](), frozenset(stops)

    def taken(text: str, end: int, on: bool) -> Cell:
        ids = tuple(held)
        held.clear()
        return Cell(ids, text, end - len(ids), "text", on, bool(ends.intersection(ids)))

    on = False
    for i, (id, marked) in enumerate(zip(tokens, trained, strict=True)):
        control = id in tokenizer.control
        if held and (control or marked != on):
            yield taken(decoder.flush(), i, on)
        on = marked
        if control:
            text = tokenizer.token(id) or f"<{id}>"
            yield Cell((id,), text, i, "control", on, id in ends)
            decoder = StreamDecoder(tokenizer)
            continue
        held.append(id)
        text = decoder.push(id)
        if text:
            yield taken(text, i + 1, on)
    if held:
        yield taken(decoder.flush(), len(tokens), on)

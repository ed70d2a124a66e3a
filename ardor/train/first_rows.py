"""The first documents that a run trains on, kept in its folder for report.html to show."""

import json
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ardor.data.batches import Batch, BatchPlan
from ardor.data.mixture import Mixture
from ardor.data.preferences import Judged
from ardor.data.shown import Cell, Document, document, part_of
from ardor.errors import CheckpointError
from ardor.files.atomic import write_atomic
from ardor.files.json import read_json
from ardor.load import Model, tokenizer_of

FILE = "first_rows.json"
SHOWN = 6  # documents: of three pairs both answers
CELLS = 400  # of each at most, so that a page of long rows stays one that opens at once


def write_first_rows(
    folder: Path, plan: BatchPlan, model: Model, mixture: Mixture, *, labels: bool
) -> None:
    """Write the first documents of the first epoch, in the trainer's own order and batches.

    `labels`: judged answers are single ones with a label, not pairs.

    Raises: CheckpointError if the disk is full or the place cannot be written.
    """
    tokenizer, stops = tokenizer_of(model), model.stops.ids
    batches = map(plan.batch, plan.epoch(0)[:SHOWN])
    places = chain.from_iterable(
        ((batch, place) for place in range(len(batch.lengths))) for batch in batches
    )
    rows = [
        document(
            batch,
            place,
            tokenizer,
            stops,
            _where(plan, batch.examples[place], mixture),
            _part(plan, batch, place, labels),
        ).shortened(CELLS)
        for batch, place in islice(places, SHOWN)
    ]
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False)
    write_atomic(folder / FILE, text + "\n")


def read_first_rows(folder: Path) -> list[Document]:
    """As they were written; none in the folder of a run that kept none.

    Raises: CheckpointError if the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = read_json(path)
        return [_read(row) for row in found]
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not what a run writes: {error}; delete it to see the rest of the report"
        ) from error


def _read(row: dict[str, Any]) -> Document:
    cells = tuple(Cell(**cell | {"ids": tuple(cell["ids"])}) for cell in row["cells"])
    trained = tuple((first, last) for first, last in row["trained"])
    return Document(**row | {"cells": cells, "trained": trained})


def _where(plan: BatchPlan, example: int, mixture: Mixture) -> str:
    dataset = plan.dataset
    part = int(dataset.part_of[example])
    row = int(dataset.row_of[example]) - dataset.bounds[part] + 1
    return f"{Path(mixture.parts[part].path).name}, row {row:,}"


def _part(plan: BatchPlan, batch: Batch, place: int, labels: bool) -> str:
    """Which of its row's documents this is, where there are several."""
    dataset, example = plan.dataset, batch.examples[place]
    second = place > 0 and batch.examples[place - 1] == example
    if isinstance(dataset, Judged):
        if labels:
            liked = "a good answer" if dataset.likes(example) else "a bad answer"
            return "the answer to another prompt, to measure how far it moved" if second else liked
        return "rejected" if second else "chosen"
    return part_of(dataset, example)

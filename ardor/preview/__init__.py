"""`ardor preview`: the rows as the model will be trained on them, token by token.

Nothing here makes rows: they come from the dataset, the batch plan and the shift that the trainer
uses, and what is marked as trained on is what has a target in the trainer's own batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.data.batches import Batch, BatchPlan
from ardor.data.dataset import Census, Dataset
from ardor.data.mixture import Mixture
from ardor.data.readers import Row
from ardor.data.shown import Document, document, part_of
from ardor.data.sources import read_rows
from ardor.errors import ConfigError
from ardor.load import Model, tokenizer_of
from ardor.sketch import sketch
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer
from ardor.train.config import Finetune
from ardor.train.run import split
from ardor.train.shown import Settings
from ardor.train.tokens import occurrence, prepare_tokens, with_date
from ardor.vocabulary import set_pad


@dataclass(frozen=True)
class Packed:
    """One micro-batch: documents end to end, which do not see each other."""

    number: int
    documents: tuple[Document, ...]
    tokens: int  # of the whole micro-batch, also where not all of it is shown
    of: int  # documents in the whole micro-batch


@dataclass(frozen=True)
class Preview:
    model: str
    data: str
    template: str | None  # its name, where conversations are rendered
    limit: int  # tokens of the longest example that is kept
    stops: tuple[tuple[int, str, tuple[str, ...]], ...]  # id, token, which files name it
    notes: tuple[str, ...]  # which tokens are added, and what pads
    batches: tuple[Packed, ...]
    examples: int  # of the whole data
    micro_batches: int
    census: Census
    left_out: tuple[str, ...]  # where the rows are that gave no example, the first few


def preview(
    model: str | Path, data: Any, rows: int = 5, settings: Settings | None = None
) -> Preview:
    """The first `rows` examples of `data` as `model` would be fine-tuned on them.

    `data` is what `finetune` takes, or rows in memory. No weights are read.

    Raises: an ArdorError as `finetune` would; ConfigError for less than one row.
    """
    settings = settings or Settings()
    if rows < 1:
        raise ConfigError(f"rows={rows}; at least 1 can be shown")
    mixture = Mixture(str(data)) if isinstance(data, str | Path) else None
    read = list(read_rows(data) if mixture is None else mixture)
    held, added = _model(str(model), settings, read)
    facts = held.decoder.facts
    limit = min(settings.max_length, facts.max_positions)
    dataset = Dataset.build(
        read,
        tokenizer_of(held),
        held.template,
        max_length=limit,
        over_length=settings.over_length,
        preferences=settings.preferences,
        vocab=facts.vocab,
        train_on=settings.train_on,
    )
    plan = _plan(dataset, settings)
    occurs = occurrence(dataset, lambda row: read[row].where)
    pad = set_pad(held, settings.pad_strategy, occurs=occurs)
    tokenizer, template, stops = tokenizer_of(held), held.template, held.stops
    planned = plan.epoch(0)
    kept = {int(row) for row in dataset.row_of}
    lost = [read[i].where for i in range(len(read)) if i not in kept]
    return Preview(
        model=str(model),
        data=str(data) if isinstance(data, str | Path) else f"{len(read)} rows in memory",
        template=None if template is None else template.name,
        limit=limit,
        stops=tuple((id, tokenizer.token(id) or "", stops.sources[id]) for id in sorted(stops.ids)),
        notes=(*added, pad),
        batches=tuple(_packed(plan, planned, rows, read, tokenizer, stops)),
        examples=len(dataset),
        micro_batches=len(planned),
        census=dataset.census,
        left_out=tuple(lost[:5]),
    )


def _model(name: str, settings: Settings, read: list[Row]) -> tuple[Model, tuple[str, ...]]:
    """The model as a run would train it but for its weights, and which tokens that adds."""
    model = sketch(name, settings.revision)
    if model.tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer.json, so there is no text to show")
    prepare_tokens(settings, model, read, settings.seed)
    with_date(settings, model)
    added = {token: id for growth in model.growths for token, id in growth.ids.items()}
    made = ", ".join(f"{token} ({id})" for token, id in added.items() if id in model.untrained)
    return model, (f"added tokens: {made}",) if made else ()


def _plan(dataset: Dataset, settings: Settings) -> BatchPlan:
    """The trainer's plan; in the order of the data unless it is to be shuffled."""
    if settings.shuffle:
        as_trained = Finetune(
            model="", data="", seed=settings.seed, eval_fraction=settings.eval_fraction
        )
        dataset, _ = split(as_trained, dataset, None)
    whole = settings.tokens_per_batch is not None
    return BatchPlan(
        dataset,
        tokens_per_batch=settings.tokens_per_batch,
        examples_per_batch=None if whole else settings.per_device_train_batch_size,
        seed=settings.seed,
        shuffle=settings.shuffle,
    )


def _packed(
    plan: BatchPlan,
    planned: list[tuple[int, ...]],
    rows: int,
    read: list[Row],
    tokenizer: Tokenizer,
    stops: StopSet,
) -> Iterator[Packed]:
    """The first micro-batches, as far as there are `rows` documents to show."""
    for number, indices in enumerate(planned, 1):
        if rows <= 0:
            return
        batch = plan.batch(indices)
        shown = [
            _document(plan.dataset, read, batch, place, tokenizer, stops)
            for place in range(min(rows, len(indices)))
        ]
        rows -= len(shown)
        yield Packed(number, tuple(shown), batch.tokens.numel(), len(indices))


def _document(
    dataset: Dataset,
    read: list[Row],
    batch: Batch,
    place: int,
    tokenizer: Tokenizer,
    stops: StopSet,
) -> Document:
    index = batch.examples[place]
    where, part = read[int(dataset.row_of[index])].where, part_of(dataset, index)
    return document(batch, place, tokenizer, stops.ids, where, part)

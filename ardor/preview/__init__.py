"""`ardor preview`: the rows as the model will be trained on them, token by token.

Nothing here makes rows: they come from the dataset, the batch plan and the shift that the trainer
uses, and what is marked as trained on is what has a target in the trainer's own batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.data.batches import Batch, BatchPlan
from ardor.data.choices import OverLength, Preferences
from ardor.data.dataset import Census, Dataset
from ardor.data.mixture import Mixture
from ardor.data.readers import Row
from ardor.data.shown import Document, document
from ardor.data.sources import read_rows
from ardor.errors import ConfigError
from ardor.files.hub import resolve
from ardor.files.json import read_object
from ardor.load import CONFIG, GENERATION, find_origin, read_texts, stops_of, text_home
from ardor.outline import outline
from ardor.text.chat import ChatTemplate, TrainOn
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer
from ardor.train.config import Finetune
from ardor.train.run import split
from ardor.train.tokens import chats, template_for

PATTERNS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
PATTERNS += ("tokenizer.model", "merges.txt")  # no weights


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the rows: the settings of `ardor finetune`, with its defaults."""

    chat_template: str | None = None
    """A template's name (such as chatml, llama3 or qwen3) or a jinja file. Default: the model's."""
    train_on: TrainOn = "all"
    """Which answers of a conversation are trained on; a message's own "train" goes before."""
    max_length: int = 1024
    """Longest example in tokens."""
    over_length: OverLength = "truncate_left"
    """What happens to longer ones: see `ardor finetune --help`; counted."""
    preferences: Preferences = "refuse"
    """Of rows that compare two answers: refuse them, or train on the chosen one."""
    tokens_per_batch: int | None = None
    """Fill micro-batches with whole documents up to this many tokens."""
    per_device_train_batch_size: int = 8
    """Examples per micro-batch, where tokens_per_batch is not given."""
    shuffle: bool = False
    """Show the first micro-batches of training, in its order and without what is held out; else
    the first rows of the data."""
    eval_fraction: float = 0.02
    """Share of the examples held out; for --shuffle."""
    seed: int = 0
    """Of the order; for --shuffle."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


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
    texts = _texts(str(model), settings.revision)
    read = list(Mixture(str(data)) if isinstance(data, str | Path) else read_rows(data))
    template = template_for(
        settings.chat_template,
        texts.tokenizer,
        texts.template,
        lambda: chats(read, settings.preferences),
    )
    limit = min(settings.max_length, texts.positions)
    dataset = Dataset.build(
        read,
        texts.tokenizer,
        template,
        max_length=limit,
        over_length=settings.over_length,
        preferences=settings.preferences,
        vocab=texts.vocab,
        train_on=settings.train_on,
    )
    plan = _plan(dataset, settings)
    stops = stops_of(texts.tokenizer, template, texts.generation, texts.config)
    planned = plan.epoch(0)
    kept = {int(row) for row in dataset.row_of}
    lost = [read[i].where for i in range(len(read)) if i not in kept]
    return Preview(
        model=str(model),
        data=str(data) if isinstance(data, str | Path) else f"{len(read)} rows in memory",
        template=None if template is None else template.name,
        limit=limit,
        stops=tuple(
            (id, texts.tokenizer.token(id) or "", stops.sources[id]) for id in sorted(stops.ids)
        ),
        batches=tuple(_packed(plan, planned, rows, read, texts.tokenizer, stops)),
        examples=len(dataset),
        micro_batches=len(planned),
        census=dataset.census,
        left_out=tuple(lost[:5]),
    )


@dataclass(frozen=True)
class _Texts:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: dict[str, Any]
    config: dict[str, Any]
    vocab: int
    positions: int


def _texts(name: str, revision: str | None) -> _Texts:
    """Everything of a model but its weights."""
    origin = find_origin(Path(name), name, None)
    found = resolve(origin.base, revision or origin.revision, patterns=PATTERNS)
    config = read_object(found.path / CONFIG)
    home = found.path if origin.adapter is None else text_home(origin.adapter, found.path)
    spec = outline(found.path).spec
    tokenizer, template = read_texts(home, spec.vocab)
    if tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer.json, so there is no text to show")
    generation = read_object(home / GENERATION) if (home / GENERATION).exists() else {}
    return _Texts(tokenizer, template, generation, config, spec.vocab, spec.max_positions)


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
    row_of = dataset.row_of
    siblings = [int(i) for i in (row_of == row_of[index]).nonzero()[0]]
    part = f"example {siblings.index(index) + 1} of {len(siblings)}" if len(siblings) > 1 else ""
    return document(batch, place, tokenizer, stops.ids, read[int(row_of[index])].where, part)

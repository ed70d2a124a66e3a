"""What ends a run that went wrong, at once and with the batch that did it.

The batch is saved with what each of its documents cost by itself; `replay` asks another model,
such as the checkpoint before, about the same ids.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from ardor.arch.causal import CausalLM
from ardor.data.batches import Batch, BatchPlan
from ardor.errors import ArdorError, DataError
from ardor.files.atomic import write_atomic
from ardor.files.json import read_text
from ardor.files.runs import newest_checkpoint
from ardor.loss import IGNORE
from ardor.score import document_loss
from ardor.text.tokenizer import Tokenizer

WINDOW = 64  # last losses that a new one is compared with
LEAST = 20  # of them, before any is called a spike
FLOOR = 0.02  # least standard deviation, as a share of the median: nothing is that steady
SIGMA = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
STEADY = 5  # losses whose mean tells divergence from a bad batch
WORSE = 1.5  # times the loss of knowing nothing, or the first one, is divergence


class Diverged(ArdorError):
    """The loss or its gradient is not a finite number, or no longer one of a model that learns."""


def spike(loss: float, recent: Sequence[float]) -> float:
    """How many robust standard deviations `loss` is above the median of the last ones.

    0.0 while there are too few to tell.
    """
    if len(recent) < LEAST:
        return 0.0
    middle = median(recent)
    spread = SIGMA * median(abs(other - middle) for other in recent)
    return (loss - middle) / max(spread, FLOOR * abs(middle), 1e-9)


def diverging(loss: float, recent: Sequence[float], first: float | None, vocab: int) -> bool:
    """Whether the last losses are all far above the first one, and above guessing."""
    if first is None or len(recent) < STEADY - 1:
        return False
    last = [*recent[-(STEADY - 1) :], loss]
    return min(last) > WORSE * max(first, math.log(vocab))


def kept(recent: Sequence[float], loss: float) -> tuple[float, ...]:
    """The losses to compare the next one with."""
    return (*recent, loss)[-WINDOW:]


def explained(run: Path, what: str, remedy: str, saved: Path | None = None) -> Diverged:
    """The error, with what was saved and how to go on."""
    newest = newest_checkpoint(run)
    whole = "no checkpoint was written yet" if newest is None else f"{newest} is whole"
    told = ""
    if saved is not None:
        other = "MODEL" if newest is None else newest
        told = f"; its batch is in {saved} (ardor score {other} {saved} --replay asks about it)"
    return Diverged(f"{what}{told}; {whole}; {remedy}")


def save_batch(
    run: Path,
    step: int,
    batches: Sequence[Batch],
    plan: BatchPlan,
    decoder: CausalLM,
    tokenizer: Tokenizer | None,
) -> Path:
    """Write the documents of a step, one JSON object a line, and return the file.

    Each has its row in the data (counted from 1), its ids, its labels (IGNORE: not trained on), its
    text, and the loss of the document alone in nats per target, as the weights are now.
    """
    lines = []
    for document in (part for batch in batches for part in _documents(batch)):
        tokens, targets = document.tokens[0].tolist(), document.targets[0].tolist()
        row: dict[str, Any] = {
            "row": int(plan.dataset.row_of[document.examples[0]]) + 1,
            "loss": _loss(decoder, document),
            "input_ids": tokens,
            "labels": [IGNORE, *targets[:-1]],  # at the token that is predicted
        }
        if tokenizer is not None:
            row["text"] = tokenizer.decode(tokens)
        lines.append(json.dumps(row, ensure_ascii=False))
    target = run / f"stopped-at-step-{step}.jsonl"
    write_atomic(target, "\n".join(lines) + "\n")
    return target


class Replayed(NamedTuple):
    """A document of a file of `save_batch`, asked about again."""

    row: int | None  # of the data
    text: str | None
    before: float | None  # nats per target when the run stopped; None: not finite
    now: float | None
    targets: int


def replayed(decoder: CausalLM, file: Path) -> Iterator[Replayed]:
    """Each document in a file of `save_batch`, with its loss under another model.

    Raises: DataError if the file holds something else, or ids or documents that the model has no
    place for.
    """
    vocab, longest = decoder.facts.vocab, decoder.facts.max_positions
    # Not splitlines: U+2028 in a text is a line end to it, and not to JSON Lines.
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{file} is empty; give a file that a stopped run has written")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            targets = torch.cat([labels[1:], torch.tensor([IGNORE])])[None]
            batch = Batch(tokens, targets, (tokens.shape[1],), (number - 1,))
            if tokens.shape != targets.shape:
                raise ValueError("as many labels as ids")
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{file}, line {number}: expected input_ids and labels, found {line[:60]!r}; give "
                "a file that a stopped run has written"
            ) from error
        if int(tokens.max()) >= vocab or tokens.shape[1] > longest:
            raise DataError(
                f"{file}, line {number}: {tokens.shape[1]} ids up to {int(tokens.max())}, where "
                f"the model takes {longest} at most, below {vocab}; give a checkpoint of the run "
                "that stopped, or its base"
            )
        count = int((targets != IGNORE).sum())
        yield Replayed(
            row.get("row"), row.get("text"), row.get("loss"), _loss(decoder, batch), count
        )


def replay(decoder: CausalLM, file: Path) -> list[float | None]:
    """The loss of each document in a file of `save_batch`, in nats per target; None: not finite.

    Raises: DataError as `replayed` does.
    """
    return [one.now for one in replayed(decoder, file)]


def _documents(batch: Batch) -> Iterator[Batch]:
    start = 0
    for length, example in zip(batch.lengths, batch.examples, strict=True):
        piece = slice(start, start + length)
        yield Batch(batch.tokens[:, piece], batch.targets[:, piece], (length,), (example,))
        start += length


@torch.no_grad()
def _loss(decoder: CausalLM, document: Batch) -> float | None:
    """None where there is no number: JSON knows none that is not finite."""
    training = decoder.training
    decoder.eval()
    loss = document_loss(decoder, document)
    decoder.train(training)
    mean = float(loss.nats) / max(1, int(loss.targets))
    return mean if math.isfinite(mean) else None

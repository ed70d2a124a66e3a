"""A deterministic order of micro-batches that can be taken up again at any point.

Axes: N tokens of one ragged row.
"""

import bisect
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ardor.data.dataset import Dataset, permutation, shift
from ardor.errors import ConfigError, DataError

Order = Literal["random", "sequential", "group_by_length", "shortest_first"]
GROUP = 50  # batches whose examples are sorted together by group_by_length
LARGEST_EPOCH = 1 << 31  # examples
WINDOW = 1024  # examples sorted together while bins are filled: fuller bins against more mixing


class Position(NamedTuple):
    """The place of the next micro-batch; with the same plan it is all that resuming needs."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: whole documents end to end in one row, without padding."""

    tokens: Int[Tensor, "1 N"]
    targets: Int[Tensor, "1 N"]  # the token that follows in the same document, or IGNORE
    lengths: tuple[int, ...]  # of the documents, in order; they sum to N
    examples: tuple[int, ...]  # in its dataset, the index of the example that each document is of

    def to(self, device: torch.device | str) -> "Batch":
        tokens, targets = self.tokens.to(device), self.targets.to(device)
        return Batch(tokens, targets, self.lengths, self.examples)


class BatchPlan:
    """Which examples are trained on together, and when: a function of (dataset, seed, epoch).

    Every epoch has every example exactly once; with `weights` it is as long as the smallest mixture
    of the dataset's parts in these shares that has room for every example. Then the examples of a
    part come in one shuffle after another, whatever the borders of epochs, and in any run of an
    epoch's examples, before they are put into batches, the shares are exact to one example.

    Give either `examples_per_batch` (the last batch of an epoch may be smaller) or
    `tokens_per_batch`, a budget that no batch exceeds and that whole documents fill as well as
    they can.

    Raises: ConfigError unless exactly one is given and at least 1; DataError if an example alone
    exceeds the budget, or a part has a weight but no examples.

    `order` of the examples: random; sequential; group_by_length (examples of similar lengths
    together, such groups in random order); shortest_first.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        tokens_per_batch: int | None = None,
        examples_per_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        order: Order = "random",
        weights: tuple[Fraction, ...] | None = None,
    ):
        given = [size for size in (tokens_per_batch, examples_per_batch) if size is not None]
        if len(given) != 1 or given[0] < 1:
            raise ConfigError(
                f"found tokens_per_batch={tokens_per_batch} and examples_per_batch="
                f"{examples_per_batch}; give exactly one of them, at least 1"
            )
        longest = int(dataset.lengths.max())
        if tokens_per_batch is not None and longest > tokens_per_batch:
            raise DataError(
                f"the longest example has {longest} tokens, more than tokens_per_batch="
                f"{tokens_per_batch}, and a document is never split; raise tokens_per_batch or "
                f"lower max_length"
            )
        self.dataset = dataset
        self.tokens_per_batch = tokens_per_batch
        self.examples_per_batch = examples_per_batch
        self.seed, self.shuffle, self.order = seed, shuffle, order
        self.weights = weights
        self.counts = None if weights is None else _counts(dataset, weights)
        self._latest: tuple[int, list[tuple[int, ...]]] | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that fixes the order, for a checkpoint to compare before it resumes."""
        return {
            "dataset": self.dataset.fingerprint,
            "tokens_per_batch": self.tokens_per_batch,
            "examples_per_batch": self.examples_per_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order": self.order,
        } | ({} if self.weights is None else {"weights": [str(share) for share in self.weights]})

    @cached_property
    def fingerprint(self) -> str:
        """Of what is trained on, for a checkpoint to compare: the dataset's, and the weights."""
        if self.weights is None:
            return self.dataset.fingerprint
        shares = " ".join(map(str, self.weights))
        return hashlib.sha256(f"{self.dataset.fingerprint} {shares}".encode()).hexdigest()

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The example indices of each batch of an epoch, in order."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._plan(epoch))
        return self._latest[1]

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        order = self._order(epoch)
        order = _arranged(order, self.dataset.lengths, self.order, self.examples_per_batch)
        count = len(order)
        if self.examples_per_batch is not None:
            starts = range(0, count, self.examples_per_batch)
            batches = [tuple(order[i : i + self.examples_per_batch].tolist()) for i in starts]
            if self.order != "group_by_length":
                return batches
            return [batches[i] for i in permutation(len(batches), self.seed, epoch, 1)]
        assert self.tokens_per_batch is not None
        if self.order in ("sequential", "shortest_first"):
            return _fill_in_order(order, self.dataset.lengths, self.tokens_per_batch)
        bins = _fill(order, self.dataset.lengths, self.tokens_per_batch)
        if not self.shuffle:
            return bins
        # A window opens its bins with its longest examples: mix the bins too.
        return [bins[i] for i in permutation(len(bins), self.seed, epoch, 1)]

    def _order(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, before they are put into batches."""
        if self.counts is None:
            count = len(self.dataset)
            return permutation(count, self.seed, epoch, 0) if self.shuffle else np.arange(count)
        drawn, places = [], []
        for part, count in enumerate(self.counts):
            drawn.append(self._draw(part, epoch * count, count))
            places.append((np.arange(count) + 0.5) / count)
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]

    def _draw(self, part: int, start: int, count: int) -> np.ndarray:
        """`count` examples of a part from place `start` of its shuffles, laid end to end."""
        members = np.flatnonzero(self.dataset.part_of == part)
        drawn: list[np.ndarray] = []
        while count:
            lap, at = divmod(start, len(members))
            order = members
            if self.shuffle:
                # 0 and 1 in the last place are of the orders of all examples and of bins.
                order = members[permutation(len(members), self.seed, lap, 2 + part)]
            drawn.append(order[at : at + count])
            start, count = start + len(drawn[-1]), count - len(drawn[-1])
        return np.concatenate(drawn)

    def batch(self, indices: tuple[int, ...]) -> Batch:
        """The micro-batch that holds these examples, in this order."""
        spans = [self.dataset.span(index) for index in indices]
        documents = [self.dataset.documents(index) for index in indices]
        lengths = tuple(chain.from_iterable(documents))
        pairs = zip(indices, documents, strict=True)
        examples = tuple(index for index, parts in pairs for _ in parts)
        tokens = np.concatenate([self.dataset.tokens[span] for span in spans]).astype(np.int64)
        supervised = np.concatenate([self.dataset.supervised[span] for span in spans])
        row = torch.from_numpy(tokens)
        targets = shift(row, torch.from_numpy(supervised), lengths)
        return Batch(row[None], targets[None], lengths, examples)

    def stream(
        self, start_epoch: int = 0, start_index: int = 0
    ) -> Iterator[tuple[Position, Batch]]:
        """Micro-batches without end, each with the position to resume from once it is done.

        Raises: DataError if there is no such position, as when data or batch size have changed.
        """
        batches = len(self.epoch(start_epoch))
        if not 0 <= start_index <= batches:
            raise DataError(
                f"cannot resume at micro-batch {start_index} of epoch {start_epoch}, which has "
                f"{batches}; the dataset or the batch size is not the one of the saved run"
            )
        epoch, done = start_epoch, start_index
        while True:
            planned = self.epoch(epoch)
            for index in range(done, len(planned)):
                last = index + 1 == len(planned)
                following = Position(epoch + 1, 0) if last else Position(epoch, index + 1)
                yield following, self.batch(planned[index])
            epoch, done = epoch + 1, 0


def _arranged(
    order: np.ndarray, lengths: np.ndarray, kind: Order, per_batch: int | None
) -> np.ndarray:
    """A shuffled order, as `kind` wants it; ties stay as they were shuffled."""
    match kind:
        case "sequential":
            return np.sort(order, kind="stable")
        case "shortest_first":
            return order[np.argsort(lengths[order], kind="stable")]
        case "group_by_length":
            # Not all of them at once: batches would hold the same examples in every epoch.
            size = GROUP * (per_batch or GROUP)
            groups = [order[i : i + size] for i in range(0, len(order), size)]
            return np.concatenate([g[np.argsort(-lengths[g], kind="stable")] for g in groups])
        case _:
            return order


def _fill_in_order(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """One bin after the other, each closed by the first example that has no room."""
    bins: list[list[int]] = [[]]
    free = budget
    for i in order.tolist():
        size = int(lengths[i])
        if size > free and bins[-1]:
            bins.append([])
            free = budget
        bins[-1].append(i)
        free -= size
    return [tuple(members) for members in bins]


def _counts(dataset: Dataset, weights: tuple[Fraction, ...]) -> list[int]:
    """How many examples of each part an epoch has."""
    held = np.bincount(dataset.part_of, minlength=len(weights)).tolist()
    if (empty := next((i for i, count in enumerate(held) if not count), None)) is not None:
        raise DataError(
            f"dataset {empty + 1} of the mixture has a weight, but none of its examples is left "
            "to train on; leave it out, or raise max_length"
        )
    total = max(math.ceil(count / share) for count, share in zip(held, weights, strict=True))
    if total > LARGEST_EPOCH:
        raise DataError(
            f"in these proportions an epoch has {total:,} examples, as every one comes at least "
            "once; raise the weights of large datasets"
        )
    exact = [share * total for share in weights]
    counts = [math.floor(share) for share in exact]
    # What rounding leaves over goes to those that lost most by it.
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _fill(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Best fit, longest first within each window; bins stay open for the windows that follow."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for i in window[np.argsort(-lengths[window], kind="stable")].tolist():
            size = int(lengths[i])
            found = bisect.bisect_left(room, (size, -1))
            if found < len(room):
                free, which = room.pop(found)
                bins[which].append(i)
            else:
                free, which = budget, len(bins)
                bins.append([i])
            bisect.insort(room, (free - size, which))
    return [tuple(indices) for indices in bins]

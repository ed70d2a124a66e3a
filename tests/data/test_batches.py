"""Micro-batches: every example once per epoch, no padding, and resuming exactly."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from ardor.data.batches import BatchPlan, Position
from ardor.data.dataset import Census, Dataset
from ardor.errors import ConfigError, DataError
from ardor.loss import IGNORE

SIZES: list[dict[str, Any]] = [
    {"examples_per_batch": 1},
    {"examples_per_batch": 4},
    {"tokens_per_batch": 64},
]


def make(lengths, bounds=(0,)):
    """Examples of these lengths, each made of a token of its own; the first third is prompt."""
    tokens = np.concatenate([np.full(n, i, dtype=np.int32) for i, n in enumerate(lengths)])
    marks = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.arange(len(lengths), dtype=np.int64)
    unended = np.zeros(len(lengths), dtype=np.bool_)
    return Dataset(tokens, marks, starts, rows, unended, Census(), bounds)


@pytest.fixture
def dataset():
    return make(np.random.default_rng(0).integers(2, 60, 203).tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_is_in_an_epoch_exactly_once(dataset, size, shuffle):
    plan = BatchPlan(dataset, **size, seed=3, shuffle=shuffle)
    for epoch in range(3):
        seen = [index for indices in plan.epoch(epoch) for index in indices]
        assert sorted(seen) == list(range(len(dataset)))
    again = BatchPlan(dataset, **size, seed=3, shuffle=shuffle)
    assert again.epoch(2) == plan.epoch(2)
    assert (plan.epoch(0) != plan.epoch(1)) == shuffle
    assert (
        BatchPlan(dataset, **size, seed=4, shuffle=shuffle).epoch(0) != plan.epoch(0)
    ) == shuffle


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_is_whole_documents_without_padding(dataset, size):
    plan = BatchPlan(dataset, **size)
    for indices in plan.epoch(0):
        batch = plan.batch(indices)
        assert batch.examples == indices
        assert batch.lengths == tuple(dataset.lengths[list(indices)].tolist())
        assert batch.tokens.shape == batch.targets.shape == (1, sum(batch.lengths))
        expected = [token for index in indices for token in dataset[index].tokens]
        assert batch.tokens[0].tolist() == expected  # nothing else, so nothing to mask
        if "tokens_per_batch" in size:
            assert sum(batch.lengths) <= size["tokens_per_batch"]


def test_no_document_predicts_the_next_one(dataset):
    plan = BatchPlan(dataset, tokens_per_batch=64)
    crossings = 0
    for indices in plan.epoch(0):
        batch = plan.batch(indices)
        tokens, targets = batch.tokens[0], batch.targets[0]
        counted = targets != IGNORE
        assert torch.equal(targets[counted], tokens[counted])  # a document repeats its own token
        assert counted.sum() == sum(dataset[index].targets for index in indices)
        crossings += (tokens[1:] != tokens[:-1]).sum().item()
    assert crossings > 50  # a shift over the whole row would have been caught


def test_every_target_is_in_an_epoch_whatever_the_batches(dataset):
    total = sum(dataset[i].targets for i in range(len(dataset)))
    for size in SIZES:
        plan = BatchPlan(dataset, **size)
        counts = [(plan.batch(i).targets != IGNORE).sum().item() for i in plan.epoch(1)]
        assert sum(counts) == total


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_resumes_exactly_from_every_position(dataset, size):
    plan = BatchPlan(dataset, **size, seed=1)
    count = len(plan.epoch(0)) + len(plan.epoch(1)) + 3
    whole = list(islice(plan.stream(), count))
    assert whole[len(plan.epoch(0)) - 1][0] == Position(1, 0)
    for done in (1, 5, len(plan.epoch(0)) - 1, len(plan.epoch(0)), count - 2):
        fresh = BatchPlan(dataset, **size, seed=1)
        position = whole[done - 1][0]
        resumed = list(islice(fresh.stream(*position), count - done))
        for (place, batch), (expected_place, expected) in zip(resumed, whole[done:], strict=True):
            assert place == expected_place
            assert batch.examples == expected.examples
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.targets, expected.targets)
    # The end of an epoch written as its last index means the same place.
    end = next(plan.stream(0, len(plan.epoch(0))))
    assert end[1].examples == plan.epoch(1)[0]


def test_a_position_beyond_the_epoch_is_refused(dataset):
    plan = BatchPlan(dataset, examples_per_batch=100)
    with pytest.raises(DataError, match="micro-batch 9 of epoch 0, which has 3; the dataset or"):
        next(plan.stream(0, 9))


def test_a_token_budget_is_nearly_filled():
    lengths = np.random.default_rng(1).integers(10, 400, 3000).tolist()
    plan = BatchPlan(make(lengths), tokens_per_batch=2048)
    filled = sum(lengths) / (len(plan.epoch(0)) * 2048)
    assert filled > 0.98
    in_order = sum(lengths) / (2048 * in_order_bins(lengths, 2048))
    assert in_order < 0.95  # taking documents as they come wastes more


def in_order_bins(lengths, budget):
    bins, room = 0, 0
    for length in lengths:
        if length > room:
            bins, room = bins + 1, budget
        room -= length
    return bins


def test_long_and_short_documents_are_mixed_over_an_epoch():
    lengths = [100] * 200 + [10] * 2000
    plan = BatchPlan(make(lengths), tokens_per_batch=200, seed=0)
    means = [np.mean([lengths[i] for i in indices]) for indices in plan.epoch(0)]
    half = len(means) // 2
    assert 0.6 < np.mean(means[:half]) / np.mean(means[half:]) < 1.6


def test_a_budget_that_a_document_exceeds_is_refused(dataset):
    longest = int(dataset.lengths.max())
    with pytest.raises(DataError, match=f"has {longest} tokens, more than tokens_per_batch=40"):
        BatchPlan(dataset, tokens_per_batch=40)
    BatchPlan(dataset, tokens_per_batch=longest)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tokens_per_batch": 64, "examples_per_batch": 2}, {"examples_per_batch": 0}],
)
def test_exactly_one_batch_size_is_needed(dataset, sizes):
    with pytest.raises(ConfigError, match="give exactly one of them, at least 1"):
        BatchPlan(dataset, **sizes)


def test_the_identity_of_a_plan_changes_with_anything_that_changes_the_order(dataset):
    plan = BatchPlan(dataset, examples_per_batch=4)
    assert plan.identity == BatchPlan(dataset, examples_per_batch=4).identity
    for other in (
        BatchPlan(dataset, examples_per_batch=5),
        BatchPlan(dataset, tokens_per_batch=64),
        BatchPlan(dataset, examples_per_batch=4, seed=1),
        BatchPlan(dataset, examples_per_batch=4, shuffle=False),
        BatchPlan(make([3, 4]), examples_per_batch=4),
    ):
        assert other.identity != plan.identity

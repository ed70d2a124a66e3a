"""Several datasets as one, in exact proportions that every epoch repeats."""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from ardor.data.batches import BatchPlan
from ardor.data.choices import Part
from ardor.data.dataset import Dataset
from ardor.data.mixture import Mixture
from ardor.errors import ConfigError, DataError


def write(path, count, word):
    path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(count)))
    return path


@pytest.fixture
def mixed(tmp_path, tokenizer):
    def make(*parts):
        paths = [write(tmp_path / f"{i}.jsonl", count, "cat") for i, (count, _) in enumerate(parts)]
        texts = [f"{p},weight={w}" for p, (_, w) in zip(paths, parts, strict=True)]
        rows = Mixture(texts)
        return Dataset.build(rows, tokenizer), rows.weights

    return make


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.jsonl", Part("a.jsonl")),
        ("a.jsonl,weight=2", Part("a.jsonl", "2")),
        ("a,split=test,weight=0.5", Part("a", "0.5", "test")),
        ("a,weight=0.5,split=test", Part("a", "0.5", "test")),
        ("a,b.jsonl,weight=1", Part("a,b.jsonl", "1")),
    ],
)
def test_a_part_is_written_as_it_is_read(text, part):
    assert Part.parse(text) == part == Part.of(text) == Part.parse(str(part))


def test_a_part_of_yaml_is_a_mapping():
    assert Part.of({"path": "a", "weight": 0.1, "split": "test"}) == Part("a", "0.1", "test")
    assert Fraction(Part.of({"path": "a", "weight": 0.1}).weight) == Fraction(1, 10)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.jsonl,wieght=2", "'wieght' is unknown; did you mean weight"),
        ("a.jsonl,weight=2,weight=3", "'weight' is given twice"),
        ("a.jsonl,weight=0", "weight of a.jsonl is '0'; expected a number above 0"),
        ("a.jsonl,weight=-1", "expected a number above 0"),
        ("a.jsonl,weight=much", "expected a number above 0"),
        ({"path": "a", "wait": 2}, "found path, wait; expected a path, or path with weight"),
        ({"weight": 2}, "found weight; expected a path"),
        (3, "found 3; expected a path"),
    ],
)
def test_a_part_that_means_nothing_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        Part.of(value)


def test_a_file_may_have_a_name_like_an_option(tmp_path):
    path = write(tmp_path / "a,weight=2", 1, "x")
    assert Part.parse(str(path)) == Part(str(path))


def test_all_or_none_have_weights(tmp_path):
    a, b = (write(tmp_path / name, 1, "x") for name in ("a.jsonl", "b.jsonl"))
    assert Mixture([str(a), str(b)]).weights is None
    assert Mixture([f"{a},weight=3", f"{b},weight=1"]).weights == (Fraction(3, 4), Fraction(1, 4))
    with pytest.raises(ConfigError, match=r"b\.jsonl has no weight, but other data have"):
        Mixture([f"{a},weight=3", str(b)])
    with pytest.raises(ConfigError, match="no data are given"):
        Mixture([])
    with pytest.raises(DataError, match="does not exist"):
        Mixture([str(a), str(tmp_path / "c.jsonl")])


def test_without_weights_datasets_follow_each_other(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", 3, "cat"), write(tmp_path / "b.jsonl", 2, "mat")
    dataset = Dataset.build(Mixture([str(a), str(b)]), tokenizer)
    assert dataset.part_of.tolist() == [0, 0, 0, 1, 1]
    assert sorted(
        i for batch in BatchPlan(dataset, examples_per_batch=2).epoch(0) for i in batch
    ) == [*range(5)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (((40, 3), (10, 1)), [40, 14]),  # 40 of 3/4 need 53.3, and so 54, of which 13.5 are b's
        (((10, 1), (90, 1)), [90, 90]),
        (((7, "0.1"), (7, "0.9")), [7, 63]),
        (((5, 1), (6, 1), (7, 1)), [7, 7, 7]),
    ],
)
def test_an_epoch_has_the_exact_shares_and_every_example(mixed, parts, counts, shuffle):
    dataset, weights = mixed(*parts)
    plan = BatchPlan(dataset, examples_per_batch=4, weights=weights, shuffle=shuffle, seed=3)
    for epoch in range(3):
        order = [i for batch in plan.epoch(epoch) for i in batch]
        found = Counter(dataset.part_of[order].tolist())
        total = sum(counts)
        assert sum(found.values()) == total == len(order)
        assert all(abs(found[i] - weights[i] * total) < 1 for i in found)
        if epoch == 0:
            assert set(order) == set(range(len(dataset)))
        assert plan.counts is not None and [found[i] for i in range(len(counts))] == plan.counts
        # Anywhere on the way the shares are right too.
        seen = np.cumsum(dataset.part_of[order] == 0)
        due = np.arange(1, total + 1) * float(weights[0])
        assert np.abs(seen - due).max() <= len(parts)


def test_a_small_part_is_gone_through_before_it_repeats(mixed):
    dataset, weights = mixed((30, 3), (7, 1))
    plan = BatchPlan(dataset, examples_per_batch=1, weights=weights, seed=1)
    drawn = [i for epoch in range(7) for (i,) in plan.epoch(epoch) if dataset.part_of[i] == 1]
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.values()) <= 1
    per_epoch = (plan.counts or [])[1]
    laps = [plan._draw(1, lap * 7, 7).tolist() for lap in range(per_epoch)]
    assert all(sorted(lap) == sorted(laps[0]) for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1


def test_the_same_seed_gives_the_same_mixture_from_any_position(mixed):
    dataset, weights = mixed((12, 2), (5, 1))
    options = {"tokens_per_batch": 40, "weights": weights, "seed": 5}
    taken = list(islice(BatchPlan(dataset, **options).stream(), 30))
    for start in (0, 1, 7, 20):
        position = taken[start - 1][0] if start else (0, 0)
        again = islice(BatchPlan(dataset, **options).stream(*position), 5)
        for (_, ours), (_, theirs) in zip(again, taken[start:], strict=False):
            assert ours.examples == theirs.examples and ours.tokens.equal(theirs.tokens)
    other = list(islice(BatchPlan(dataset, **options | {"seed": 6}).stream(), 30))
    assert [b.examples for _, b in other] != [b.examples for _, b in taken]


def test_weights_belong_to_what_a_checkpoint_compares(mixed):
    dataset, weights = mixed((6, 2), (5, 1))
    plain = BatchPlan(dataset, examples_per_batch=2)
    weighted = BatchPlan(dataset, examples_per_batch=2, weights=weights)
    other = BatchPlan(dataset, examples_per_batch=2, weights=weights[::-1])
    assert len({p.fingerprint for p in (plain, weighted, other)}) == 3
    assert plain.fingerprint == dataset.fingerprint  # as in checkpoints without weights
    assert "weights" not in plain.identity and weighted.identity != other.identity


def test_a_part_without_examples_has_no_share(mixed):
    dataset, weights = mixed((6, 2), (5, 1))
    only_first = dataset._select(dataset.part_of == 0)
    with pytest.raises(DataError, match="dataset 2 of the mixture has a weight, but none of its"):
        BatchPlan(only_first, examples_per_batch=2, weights=weights)


def test_proportions_that_make_an_endless_epoch_are_refused(mixed):
    dataset, weights = mixed((6, "1e-12"), (5, 1))
    with pytest.raises(DataError, match="in these proportions an epoch has 6,000,000,"):
        BatchPlan(dataset, examples_per_batch=2, weights=weights)


def test_a_split_keeps_its_parts(mixed):
    dataset, weights = mixed((30, 1), (30, 1))
    train, held = dataset.split(0.2, seed=1)
    assert len(train) + len(held) == 60
    assert set(train.part_of.tolist()) == {0, 1}
    assert (train.part_of == (train.row_of >= 30)).all()
    assert BatchPlan(train, examples_per_batch=3, weights=weights).counts is not None

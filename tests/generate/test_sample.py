"""Which tokens a choice may take, how often it takes them, and that a seed decides the rest."""

import math

import pytest
import torch

from ardor.errors import ConfigError
from ardor.generate.sample import greedy, penalise_repetition, sampler

PROBS = torch.tensor([[0.05, 0.4, 0.02, 0.3, 0.13, 0.1]])
LOGITS = PROBS.log()
DRAWS = 20_000


def drawn(logits: torch.Tensor = LOGITS, draws: int = DRAWS, **settings) -> torch.Tensor:
    """How often each token was chosen."""
    generator = torch.Generator().manual_seed(0)
    choose = sampler(**{"temperature": 1.0, "generator": generator, **settings})
    ids = choose(logits.expand(draws, -1))
    return torch.bincount(ids, minlength=logits.shape[-1])


def taken(**settings) -> set[int]:
    return set(drawn(**settings).nonzero().flatten().tolist())


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected).square() / expected).sum())


# The 0.1 % points of the chi-square distribution, by degrees of freedom.
LIMIT = {2: 13.82, 3: 16.27, 5: 20.52}


def test_samples_at_temperature_1_follow_the_softmax():
    counts = drawn()
    assert chi_square(counts, PROBS[0]) < LIMIT[5]
    flatter = (LOGITS / 1.2).softmax(-1)[0]
    assert chi_square(counts, flatter) > LIMIT[5]  # the probe can tell


def test_the_temperature_divides_the_logits():
    counts = drawn(temperature=2.5)
    assert chi_square(counts, (LOGITS / 2.5).softmax(-1)[0]) < LIMIT[5]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.39}, {1}),  # 0.4 alone reaches it
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.82}, {1, 3, 4}),  # 0.83
        ({"top_p": 0.84}, {1, 3, 4, 5}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.3}, {1, 3, 4}),  # at least 0.12
        ({"min_p": 0.24}, {1, 3, 4, 5}),  # at least 0.096
        ({"min_p": 0.0}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 5, "top_p": 0.84, "min_p": 0.3}, {1, 3, 4}),  # all must keep a token
    ],
)
def test_filters_keep_the_right_tokens(settings, kept):
    assert taken(**settings) == kept


def test_what_is_kept_keeps_its_proportions():
    counts = drawn(top_k=3)[torch.tensor([1, 3, 4])]
    assert chi_square(counts, torch.tensor([0.4, 0.3, 0.13]) / 0.83) < LIMIT[2]
    counts = drawn(top_p=0.84)[torch.tensor([1, 3, 4, 5])]
    assert chi_square(counts, torch.tensor([0.4, 0.3, 0.13, 0.1]) / 0.93) < LIMIT[3]


def test_filters_look_at_the_distribution_after_the_temperature():
    # At temperature 4 the first two hold less than 0.5, at 1 they hold 0.7.
    hot = (LOGITS / 4).softmax(-1)[0].sort(descending=True).values.cumsum(0)
    assert hot[1] < 0.5
    assert taken(top_p=0.5) == {1, 3}
    assert len(taken(top_p=0.5, temperature=4.0)) > 2


def test_temperature_0_is_greedy_and_takes_the_lowest_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, -5.0, 2.0, 1.0]])
    assert sampler(temperature=0.0, top_p=0.1) is greedy
    assert greedy(logits).tolist() == [1, 2]


def test_rows_of_a_batch_are_filtered_each_by_itself():
    logits = torch.tensor([[0.0, 5.0, 0.0, 0.0], [3.0, 0.0, 2.9, 0.0]]).repeat(2000, 1)
    choose = sampler(temperature=1.0, top_k=2, generator=torch.Generator().manual_seed(0))
    ids = choose(logits).view(-1, 2)
    assert set(ids[:, 1].tolist()) == {0, 2}
    assert (ids[:, 0] == 1).float().mean() > 0.95


def test_a_seed_repeats_its_samples_and_another_does_not():
    def ids(seed):
        generator = torch.Generator().manual_seed(seed)
        return sampler(temperature=1.0, generator=generator)(LOGITS.expand(50, -1)).tolist()

    assert ids(1) == ids(1) != ids(2)


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert set(drawn(logits, top_p=1.0).nonzero().flatten().tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be finite"),
        ({"temperature": math.inf}, "temperature=inf must be finite"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 must be from 0 to 1"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        sampler(**{"temperature": 1.0, **settings})


def test_the_repetition_penalty_is_the_papers():
    logits = torch.tensor([2.0, -1.0, 0.0, 3.0, -4.0])
    found = penalise_repetition(logits, torch.tensor([0, 1, 0, 2]), 1.5)
    torch.testing.assert_close(found, torch.tensor([2.0 / 1.5, -1.5, 0.0, 3.0, -4.0]))
    assert logits.tolist() == [2.0, -1.0, 0.0, 3.0, -4.0]  # the model's own stay as they are

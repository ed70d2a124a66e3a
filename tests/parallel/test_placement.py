"""Maps of modules to devices, against transformers' and accelerate's own functions."""

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import accelerate.utils.modeling as accelerate
import pytest
import torch
import transformers.integrations.accelerate as transformers

from ardor.errors import ConfigError
from ardor.parallel.placement import (
    STRATEGIES,
    Node,
    allocate,
    allowance,
    balanced,
    collapsed,
    device_map,
    expanded,
    parse_size,
)

from . import theirs


def draws(count: int, first: int = 0) -> Iterator[random.Random]:
    return map(random.Random, range(first, first + count))


def case(draw: random.Random) -> tuple[Any, Node, list[frozenset[str]], dict[Any, int]]:
    model = theirs.on_meta(theirs.random_keys(draw), draw.choice(theirs.DTYPES))
    root, ties = theirs.tree(model)
    return model, root, ties, theirs.random_memory(draw, root.size)


def compared(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Our maps of so many cases, each equal to theirs by every strategy."""
    found = []
    for draw in draws(count, first):
        model, root, ties, memory = case(draw)
        for strategy in STRATEGIES:
            wanted = transformers._get_device_map(model, strategy, deepcopy(memory), None)
            given = device_map(root, strategy, allowance(memory), ties)
            assert given == dict(wanted), (model.config.model_type, strategy, memory)
            found.append(given)
    return found


def test_maps_are_transformers_maps():
    assert len(compared(5)) == 20


@pytest.mark.sweep
def test_300_random_models_by_four_strategies_have_transformers_maps():
    found = compared(300, first=100)
    assert len(found) == 1200
    # The cases are worth something: most maps spread a model, over all kinds of places.
    spread = [given for given in found if len({*given.values()}) > 1]
    assert len(spread) > 600
    assert {device for given in found for device in given.values()} == {0, 1, 2, 3, "cpu", "disk"}


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Current model requires")  # of rotary tables
def test_200_random_models_have_accelerates_maps_in_a_given_memory():
    for draw in draws(200, first=1000):
        model, root, ties, memory = case(draw)
        model.tie_weights()
        kinds = [*model._no_split_modules]
        wanted = accelerate.infer_auto_device_map(model, deepcopy(memory), kinds)
        given = collapsed(allocate(root, allowance(memory), ties))
        assert given == dict(wanted), (model.config.model_type, memory)

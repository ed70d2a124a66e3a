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


def test_balanced_memory_is_accelerates_where_a_layer_is_the_largest_thing():
    """It takes the mean of the leaves for the slack, transformers the largest: we follow that."""
    keys = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 512, "vocab_size": 8,
            "num_attention_heads": 2, "num_hidden_layers": 6, "pad_token_id": 0}  # fmt: skip
    compared = 0
    for draw in draws(20):
        larger = draw.random() < 0.5
        model = theirs.on_meta(keys | {"vocab_size": 5000 if larger else 8}, torch.float32)
        root, _ = theirs.tree(model)
        memory = {i: int(root.size * draw.uniform(0.2, 2)) for i in range(draw.randint(1, 4))}
        low_zero = draw.random() < 0.5
        wanted = accelerate.get_balanced_memory(
            model, deepcopy(memory), [*model._no_split_modules], low_zero=low_zero
        )
        given = balanced(root, allowance(memory), low_zero=low_zero)
        if larger:
            assert all(given[device] >= wanted[device] for device in [*memory][1:])
        else:
            assert given == wanted
            compared += 1
    assert compared > 5


def test_where_we_differ_low_zero_needs_no_accelerator_zero():
    """transformers looks up device 0, and its sum of the others counts from 1 without gaps."""
    model = theirs.on_meta({"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32,
                            "num_attention_heads": 2, "vocab_size": 50}, torch.float32)  # fmt: skip
    root, ties = theirs.tree(model)
    memory = {2: root.size, 3: root.size}
    with pytest.raises(KeyError):
        transformers._get_device_map(model, "balanced_low_0", dict(memory), None)
    given = device_map(root, "balanced_low_0", allowance(memory), ties)
    renamed = {0: root.size, 1: root.size}
    wanted = transformers._get_device_map(model, "balanced_low_0", dict(renamed), None)
    assert given == {name: device + 2 for name, device in wanted.items()}


def test_where_we_differ_layer_10_is_not_layer_1():
    """transformers matches a map's names as beginnings of texts, not of dotted names."""
    parts = ["layers.1", "layers.10"]
    expand = transformers.expand_device_map
    names = [f"{part}.weight" for part in parts]
    assert expand({"layers.1": 0, "": "disk"}, names) == dict.fromkeys(names, 0)
    found = expanded({"layers.1": 0, "": "disk"}, parts, parts)
    assert found == {"layers.1": 0, "layers.10": "disk"}


def test_where_we_differ_tied_weights_in_two_places_are_refused():
    """accelerate warns, and has two copies that were one."""
    parts = ["model.embed_tokens", "lm_head"]
    ties = [frozenset(f"{part}.weight" for part in parts)]
    for given in ({"model": 0, "": 0}, {"": "disk"}):
        assert {*expanded(given, parts, [], ties).values()} == {*given.values()}
    with pytest.raises(ConfigError, match=r"model\.embed_tokens on 0 and lm_head on cpu, but they"):
        expanded({"model": 0, "lm_head": "cpu"}, parts, [], ties)


def home(given: dict[str, Any], name: str) -> Any:
    within = [key for key in given if not key or name == key or name.startswith(f"{key}.")]
    assert within, name
    return given[max(within, key=len)]


def test_no_layer_is_split_and_no_tie_torn():
    spread = 0
    for draw in draws(40, first=5000):
        _, root, ties, memory = case(draw)
        layers = [module.name for module in root.modules() if module.whole]
        for strategy in STRATEGIES:
            given = device_map(root, strategy, allowance(memory), ties)
            spread += len({*given.values()}) > 1
            assert not any(name.startswith(f"{layer}.") for name in given for layer in layers)
            assert all(home(given, layer) in (*memory, "disk") for layer in layers)
            assert all(len({home(given, name) for name in group}) == 1 for group in ties)
    assert spread > 80


@pytest.mark.parametrize("amount", [
    0, 10**9, "10GiB", "10gib", "1.5MiB", "2KiB", "10GB", "3MB", "4KB", "10Gb", "8kb", " 7GiB "
])  # fmt: skip
def test_amounts_are_read_as_accelerate_reads_them(amount):
    text = amount.strip() if isinstance(amount, str) else amount
    assert parse_size(amount) == accelerate.convert_file_size_to_int(text)
    assert parse_size("1000") == 1000  # which a command line gives


@pytest.mark.parametrize("amount", ["", "GiB", "-1GiB", -1, "ten", "10TiB", "infGiB", True])
def test_an_amount_that_is_none_is_refused(amount):
    with pytest.raises(ConfigError, match="max_memory: .* is no amount of memory; give bytes, or"):
        parse_size(amount)


def test_memory_is_in_the_order_in_which_devices_are_filled():
    found = allowance({"disk": 5, "cpu": "1KiB", 2: 7, "0": 9, 1: 8})
    assert [*found.items()] == [(0, 9), (1, 8), (2, 7), ("cpu", 1024), ("disk", 5)]
    for wrong in ({"gpu": 1}, {-1: 1}, {None: 1}, {True: 1}, {"cuda:0": 1}):
        with pytest.raises(ConfigError, match="is no device; name accelerators by number"):
            allowance(wrong)
    with pytest.raises(ConfigError, match="max_memory is empty"):
        allowance({})


def test_a_lone_accelerator_that_was_measured_keeps_a_tenth_for_computing():
    root = Node("", children=(Node("a", parameters=(Node("a.w", bytes=95),)),))
    assert device_map(root, "auto", {0: 100, "cpu": 100}) == {"a": 0}
    assert device_map(root, "auto", {0: 100, "cpu": 200}, measured=True) == {"a": "cpu"}
    assert device_map(root, "sequential", {0: 100, "cpu": 200}, measured=True) == {"a": 0}

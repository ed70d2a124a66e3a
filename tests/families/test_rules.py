"""Names go there and back, tensors bit for bit, and nothing is left out in silence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ardor.errors import CheckpointError
from ardor.families.rules import Ignorable, Rule, Rules, disk_linears, weight

RULES = Rules(
    prefix="body.",
    rules=(
        *weight("body.embed", "embed_tokens"),
        *weight("body.fused", "a_proj", "b_proj", "c_proj", bias=True, transposed=True),
        *weight("body.norm", "norm"),
    ),
    tied_head=Rule("lm_head.weight", ("embed_tokens.weight",)),
    ignorable=(Ignorable(pattern=r"fused\.mask", reason="a mask"),),
)
NAMES = ("body.embed.weight", "body.fused.weight", "body.fused.bias", "body.norm.weight")


@given(
    parts=st.integers(1, 3),
    size=st.integers(1, 3),
    inputs=st.integers(1, 4),
    transposed=st.booleans(),
)
def test_a_rule_and_its_inverse_give_the_same_bits(parts, size, inputs, transposed):
    names = tuple("abc"[:parts])
    rule = Rule("disk", names, transposed)
    shape = (inputs, parts * size) if transposed else (parts * size, inputs)
    disk = torch.arange(parts * size * inputs, dtype=torch.float32).view(shape)
    memory = rule.to_memory(disk)
    assert {name: tuple(t.shape) for name, t in memory.items()} == rule.shapes(shape)
    assert set(rule.shapes(shape).values()) == {(size, inputs)}
    assert torch.equal(rule.to_disk(memory.__getitem__), disk)


def test_the_parts_of_a_fused_tensor_are_its_columns_in_order():
    disk = torch.arange(12.0).view(2, 6)  # [in, 3 * out]
    memory = Rule("disk", ("q", "k", "v"), transposed=True).to_memory(disk)
    assert memory["k"].tolist() == [[2.0, 8.0], [3.0, 9.0]]  # [out, in]


def test_a_tensor_that_does_not_split_is_named():
    with pytest.raises(CheckpointError, match=r"disk of shape \[5, 2\] does not split into 3"):
        Rule("disk", ("q", "k", "v")).to_memory(torch.zeros(5, 2))


def test_missing_and_unexpected_names_are_both_told():
    names = ("body.embed.weight", "body.fused.weight", "body.norm.weight", "body.norm.extra")
    with pytest.raises(
        CheckpointError, match=r"dir: missing body\.fused\.bias; unexpected body\.n"
    ):
        RULES.check(names, "dir")
    RULES.check(NAMES, "dir")


def test_a_long_list_of_names_is_cut():
    with pytest.raises(CheckpointError, match=r"unexpected x0, .*x15 and 12 more; the weights"):
        RULES.check((*NAMES, *(f"x{i}" for i in range(20))), "dir")


def test_buffers_are_ignored_with_their_reason():
    for prefix in ("body.", ""):
        account = RULES.account((*NAMES, f"{prefix}fused.mask"))
        assert account.ignored == {f"{prefix}fused.mask": "a mask"}
        assert not account.unexpected
    assert RULES.account(("body.fused.mask.extra",)).unexpected == ("body.fused.mask.extra",)


def test_a_checkpoint_without_the_prefix_keeps_its_naming():
    bare = tuple(name.removeprefix("body.") for name in NAMES)
    assert RULES.account(bare).missing == NAMES  # unbound rules do not guess
    bound = RULES.bind(bare)
    bound.check(bare, "dir")
    state = {name: torch.zeros(3, 1) for rule in RULES.rules for name in rule.memory}
    assert tuple(name for name, _ in bound.to_disk(state.__getitem__)) == bare
    assert tuple(name for name, _ in RULES.bind(NAMES).to_disk(state.__getitem__)) == NAMES


def test_the_copy_of_a_tied_head_is_saved_only_where_it_was():
    state = {name: torch.zeros(3, 1) for rule in RULES.rules for name in rule.memory}
    for names in (NAMES, (*NAMES, "lm_head.weight")):
        bound = RULES.bind(names)
        bound.check(names, "dir")
        assert tuple(name for name, _ in bound.to_disk(state.__getitem__)) == names
    assert tuple(name for name, _ in RULES.to_disk(state.__getitem__)) == NAMES


def test_linear_maps_and_the_embedding_know_their_place_on_disk():
    assert disk_linears(RULES) == {
        "embed_tokens": ("body.embed", 0, 1, False),
        "a_proj": ("body.fused", 0, 3, True),
        "b_proj": ("body.fused", 1, 3, True),
        "c_proj": ("body.fused", 2, 3, True),
    }

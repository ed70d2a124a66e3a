"""Names go there and back, tensors bit for bit, and nothing is left out in silence."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ardor.errors import CheckpointError
from ardor.families.rules import Either, Ignorable, Rule, Rules, Stack, disk_linears, weight

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
    memory = rule.to_memory({"disk": disk}.__getitem__)
    shapes = rule.shapes({"disk": shape}.__getitem__)
    assert {name: tuple(t.shape) for name, t in memory.items()} == shapes
    assert set(shapes.values()) == {(size, inputs)}
    assert torch.equal(rule.to_disk(memory.__getitem__)["disk"], disk)


def test_parts_that_take_turns_come_apart_and_together_again():
    disk = torch.arange(16.0).view(8, 2)  # two heads of queries (2 rows), a key and a value
    rule = Rule("disk", ("q", "k", "v"), sizes=(4, 2, 2), groups=2)
    memory = rule.to_memory({"disk": disk}.__getitem__)
    rows = {name: (part[:, 0] // 2).tolist() for name, part in memory.items()}
    assert rows == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    assert torch.equal(rule.to_disk(memory.__getitem__)["disk"], disk)


def test_a_tensor_of_all_experts_is_cut_along_its_second_axis():
    disk = torch.arange(24.0).view(2, 3, 4)  # [experts, in, gate and up in turn]
    rule = Rule("disk", ("gate", "up"), transposed=True, groups=2, axis=1)
    memory = rule.to_memory({"disk": disk}.__getitem__)
    assert memory["gate"][0].tolist() == [[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]]  # [out, in]
    assert rule.shapes({"disk": (2, 3, 4)}.__getitem__) == {"gate": (2, 2, 3), "up": (2, 2, 3)}
    assert torch.equal(rule.to_disk(memory.__getitem__)["disk"], disk)


def test_tensors_of_single_experts_are_stacked_and_come_apart_again():
    disk = {f"expert.{i}": torch.full((2, 3), float(i)) for i in range(3)}
    rule = Stack(tuple(disk), "experts")
    whole = rule.to_memory(disk.__getitem__)
    assert whole["experts"].shape == (3, 2, 3) and whole["experts"][2].eq(2).all()
    back = rule.to_disk(whole.__getitem__)
    assert back.keys() == disk.keys() and all(torch.equal(back[n], disk[n]) for n in disk)
    with pytest.raises(CheckpointError, match=r"b has the shape \[3\], but a \[2\]"):
        Stack(("a", "b"), "c").shapes({"a": (2,), "b": (3,)}.__getitem__)


def test_of_two_ways_the_one_in_the_file_is_kept():
    ways = Either(((Stack(("e.0", "e.1"), "up"),), (Rule("e.all", ("up",)),)))
    rules = Rules(rules=(ways,))
    assert rules.account(("e.all",)).missing == ("e.0", "e.1")  # unbound rules do not guess
    for names in (("e.0", "e.1"), ("e.all",)):
        bound = rules.bind(names)
        bound.check(names, "dir")
        assert tuple(dict(bound.to_disk({"up": torch.zeros(2, 1)}.__getitem__))) == names


def test_the_parts_of_a_fused_tensor_are_its_columns_in_order():
    disk = torch.arange(12.0).view(2, 6)  # [in, 3 * out]
    memory = Rule("disk", ("q", "k", "v"), transposed=True).to_memory({"disk": disk}.__getitem__)
    assert memory["k"].tolist() == [[2.0, 8.0], [3.0, 9.0]]  # [out, in]


def test_a_tensor_that_does_not_split_is_named():
    with pytest.raises(CheckpointError, match=r"disk of shape \[5, 2\] does not split into 3"):
        Rule("disk", ("q", "k", "v")).shapes({"disk": (5, 2)}.__getitem__)


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
        assert {n: e.reason for n, e in account.ignored.items()} == {
            f"{prefix}fused.mask": "a mask"
        }
        assert not account.unexpected
    assert RULES.account(("body.fused.mask.extra",)).unexpected == ("body.fused.mask.extra",)


def test_a_checkpoint_without_the_prefix_keeps_its_naming():
    bare = tuple(name.removeprefix("body.") for name in NAMES)
    assert RULES.account(bare).missing == NAMES  # unbound rules do not guess
    bound = RULES.bind(bare)
    bound.check(bare, "dir")
    state = {name: torch.zeros(3, 1) for rule in RULES.plain for name in rule.memory}
    assert tuple(name for name, _ in bound.to_disk(state.__getitem__)) == bare
    assert tuple(name for name, _ in RULES.bind(NAMES).to_disk(state.__getitem__)) == NAMES


def test_a_checkpoint_with_another_prefix_keeps_its_naming():
    rules = replace(RULES, aliases=("old.body.",))
    names = tuple(f"old.{name}" for name in NAMES)
    with pytest.raises(CheckpointError, match=r"missing body\.embed"):
        RULES.bind(names).check(names, "dir")
    bound = rules.bind(names)
    bound.check(names, "dir")
    state = {name: torch.zeros(3, 1) for rule in RULES.plain for name in rule.memory}
    assert tuple(name for name, _ in bound.to_disk(state.__getitem__)) == names
    assert rules.bind(NAMES).plain == RULES.plain


def test_what_is_ignored_is_kept_only_if_it_belongs_in_a_copy():
    eye = Ignorable(pattern=r"eye\..+", reason="sees", kept=True)
    rules = replace(RULES, ignorable=(*RULES.ignorable, eye))
    names = (*NAMES, "body.fused.mask", "eye.weight")
    rules.check(names, "dir")
    assert rules.kept(names) == ("eye.weight",) and RULES.kept(names) == ()


def test_the_copy_of_a_tied_head_is_saved_only_where_it_was():
    state = {name: torch.zeros(3, 1) for rule in RULES.plain for name in rule.memory}
    for names in (NAMES, (*NAMES, "lm_head.weight")):
        bound = RULES.bind(names)
        bound.check(names, "dir")
        assert tuple(name for name, _ in bound.to_disk(state.__getitem__)) == names
    assert tuple(name for name, _ in RULES.to_disk(state.__getitem__)) == NAMES


def test_linear_maps_and_the_embedding_know_their_place_on_disk():
    assert disk_linears(RULES) == {
        "embed_tokens": ("body.embed", 0, 1, False, 1, False, None),
        "a_proj": ("body.fused", 0, 3, True, 1, False, None),
        "b_proj": ("body.fused", 1, 3, True, 1, False, None),
        "c_proj": ("body.fused", 2, 3, True, 1, False, None),
        "norm": ("body.norm", 0, 1, False, 1, False, None),  # that can be trained in full
    }


def test_a_layer_is_ignored_only_beside_what_marks_it_and_is_kept():
    drafting = Ignorable(
        pattern=r"layers\.2\..*", beside="layers.2.mark", reason="drafts", kept=True
    )
    rules = replace(RULES, ignorable=(drafting,))
    alone = (*NAMES, "body.layers.2.up")
    assert rules.account(alone).unexpected == ("body.layers.2.up",)
    assert not rules.kept(alone)
    marked = (*alone, "body.layers.2.mark")
    assert not rules.account(marked).unexpected
    assert {*rules.kept(marked)} == {"body.layers.2.up", "body.layers.2.mark"}

"""What is special to families with experts: two ways to hold them, and Phi's long factors."""

import pytest
import torch

import ardor
from ardor.files.weights import open_weights

from . import cases_deep
from .cases_moe import CASES
from .peer import CLOSE, contents, logits, peer, saved, tokens

pytestmark = pytest.mark.sweep

IN_TWO_WAYS = {**CASES, **{n: c for n, c in cases_deep.CASES.items() if n.startswith("deepseek")}}
ONE_EACH = {name.split(":")[0]: case for name, case in IN_TWO_WAYS.items()}


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)
def test_experts_are_read_and_saved_in_either_layout(tmp_path, case):
    """The published one, as they save by default, and that of their memory since version 5."""
    theirs = peer(case)
    published = saved(theirs, tmp_path / "published")
    stacked = saved(theirs, tmp_path / "stacked", save_original_format=False)
    names, others = ({*open_weights(place).names()} for place in (published, stacked))
    assert not any(name.endswith("experts.down_proj") for name in names)
    assert any(name.endswith("experts.down_proj") for name in others)

    one, other = ardor.load(published), ardor.load(stacked)
    assert torch.equal(one.logits(tokens()), other.logits(tokens()))
    for lm, source in ((one, published), (other, stacked)):
        lm.save(tmp_path / "again" / source.name)
        assert contents(tmp_path / "again" / source.name) == contents(source)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_experts_that_are_stacked_as_published_have_one_layout(tmp_path, name):
    case = next(case for case in cases_deep.CASES.values() if case.model_type == name)
    theirs = peer(case)
    one = saved(theirs, tmp_path / "published")
    other = saved(theirs, tmp_path / "stacked", save_original_format=False)
    assert contents(one) == contents(other)
    assert any(name.endswith("experts.down_proj") for name in open_weights(one).names())


def test_long_texts_turn_by_phis_long_factors_as_its_own_code_does(tmp_path):
    """Theirs is told the length, which transformers 5.23 forgets to pass on."""
    case = CASES["phimoe: longrope, amplitude by length"]
    long = [1.0, 2.5, 4.0, 7.0]
    rope = {**case.keys["rope_parameters"], "long_factor": long}
    theirs = peer(type(case)("phimoe", {**case.keys, "rope_parameters": rope}, sizes=case.sizes))
    ours = ardor.load(saved(theirs, tmp_path))
    short, whole = tokens(length=10), tokens(length=11)
    turning = theirs.model.rotary_emb
    original = turning.rope_init_fn
    torch.testing.assert_close(ours.logits(short), logits(theirs, short), **CLOSE)
    assert (ours.logits(whole) - logits(theirs, whole)).abs().max() > 0.01  # it does forget
    turning.rope_init_fn = lambda config: original(config, seq_len=11)
    torch.testing.assert_close(ours.logits(whole), logits(theirs, whole), **CLOSE)

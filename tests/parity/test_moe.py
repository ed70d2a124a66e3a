"""What is special to families with experts: two ways to hold them, and Phi's long factors."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import ardor
from ardor.files.weights import open_weights

from .cases_moe import CASES
from .peer import CLOSE, contents, logits, peer, saved, tokens

pytestmark = pytest.mark.sweep

ONE_EACH = {name.split(":")[0]: case for name, case in CASES.items()}


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)
def test_experts_are_read_and_saved_in_either_layout(tmp_path, case):
    """The published one, and that of transformers' memory since version 5."""
    theirs = peer(case)
    published, stacked = saved(theirs, tmp_path / "published"), tmp_path / "stacked"
    stacked.mkdir()
    shutil.copy(published / "config.json", stacked)
    held = {n: t.contiguous() for n, t in theirs.state_dict().items()}
    if case.keys.get("tie_word_embeddings"):
        del held["lm_head.weight"]
    save_file(held, stacked / "model.safetensors")
    names = {*open_weights(published).names()}
    assert "model.layers.0.mlp.experts.down_proj" not in names and names != held.keys()

    one, other = ardor.load(published), ardor.load(stacked)
    assert torch.equal(one.logits(tokens()), other.logits(tokens()))
    for lm, source in ((one, published), (other, stacked)):
        lm.save(tmp_path / "again" / source.name)
        assert contents(tmp_path / "again" / source.name) == contents(source)


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

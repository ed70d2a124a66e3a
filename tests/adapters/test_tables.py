"""Tables of tokens in PEFT's files: of resized bases and tied heads, and what is refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ardor
from ardor.errors import CheckpointError

from ..parity.peer import Case, logits, peer, saved
from .test_theirs import SIZES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:.*target_parameters"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
ROWS = 53
CASES = {
    "untied": Case("llama", {"tie_word_embeddings": False}, sizes=SIZES),
    "tied": Case("llama", {"tie_word_embeddings": True}, sizes=SIZES),
}


def theirs(base: Path, more: int = 0):
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    if more:
        model.resize_token_embeddings(ROWS + more, mean_resizing=False)
    return model


def trained(base: Path, directory: Path, ids, more: int = 0, **settings):
    """The logits of an adapter that PEFT made on a base of `more` rows, random, and saved."""
    torch.manual_seed(0)
    model = get_peft_model(theirs(base, more), PeftConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(directory))
    return logits(model.eval(), ids)


def reading(rows: int):
    """Ids that include the last ones."""
    ids = torch.randint(0, rows, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[:, ::5], ids[:, 1::7] = rows - 1, rows - 3
    return ids


SETTINGS = {
    "elsewhere": {},
    "in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [4, 49]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [4, 49], "lm_head": [4, 49]}},
}


@pytest.mark.parametrize("more", [3, -3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.sweep
def test_an_adapter_of_a_resized_base_is_read_whole(kind, settings, more, tmp_path):
    """PEFT saves the tables beside it, and needs the base resized by hand."""
    base = saved(peer(CASES[kind]), tmp_path / "base")
    rows, close = ROWS + more, {"rtol": 1e-4, "atol": 1e-4}
    ids = reading(rows)
    chosen = {"target_modules": ["q_proj"], "ensure_weight_tying": kind == "tied", **settings}
    expected = trained(base, tmp_path / "a", ids, more, **chosen)
    lm = ardor.load(base, adapter=tmp_path / "a", dtype="float32")
    assert lm.model.decoder.facts.vocab == max(rows, ROWS)  # never fewer
    torch.testing.assert_close(lm.logits(ids)[..., :rows], expected, **close)
    lm.save(tmp_path / "again")
    again = ardor.load(base, adapter=tmp_path / "again", dtype="float32")
    torch.testing.assert_close(again.logits(ids)[..., :rows], expected, **close)
    back = PeftModel.from_pretrained(theirs(base, max(more, 0)), str(tmp_path / "again"))
    torch.testing.assert_close(logits(back.eval(), ids)[..., :rows], expected, **close)
    lm.merge()
    lm.save(tmp_path / "merged")
    found = logits(theirs(tmp_path / "merged"), ids)[..., :rows]
    torch.testing.assert_close(found, expected, **close)


def test_only_the_rows_that_a_base_lacks_are_kept_of_its_tables(tmp_path):
    base = saved(peer(CASES["untied"]).bfloat16(), tmp_path / "base")
    trained(base, tmp_path / "a", reading(56), 3, target_modules=["q_proj"])
    for dtype in ("bfloat16", "float32"):  # the file has the former
        lm = ardor.load(base, adapter=tmp_path / "a", dtype=dtype)
        assert lm.model.adapter is not None
        new = (53, 54, 55)
        assert lm.model.adapter.token_rows == {"embed_tokens": new, "lm_head": new}


def test_rows_named_of_both_tables_of_a_tied_pair_are_one(tmp_path):
    base, ids = saved(peer(CASES["tied"]), tmp_path / "base"), reading(ROWS)
    rows = {"lm_head": [52, 2], "embed_tokens": [52, 2]}
    expected = trained(
        base, tmp_path / "a", ids, target_modules=["q_proj"], trainable_token_indices=rows
    )
    lm = ardor.load(base, adapter=tmp_path / "a", dtype="float32")
    torch.testing.assert_close(lm.logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert lm.model.decoder.lm_head.tokens is lm.model.decoder.embed_tokens


APART = {
    "rows": {"trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [3, 4]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [1, 2]}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("settings", APART.values(), ids=APART)
def test_a_tied_pair_that_was_trained_apart_is_refused_for_that(settings, tmp_path):
    base = saved(peer(CASES["tied"]), tmp_path / "base")
    trained(base, tmp_path / "a", reading(ROWS), **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(CheckpointError, match=r"head is its embedding, .* apart from the other"):
        ardor.load(base, adapter=tmp_path / "a")


REFUSED = {
    "magnitudes": ({"target_modules": ["embed_tokens"], "use_dora": True}, 0, "use_dora of the em"),
    "resized": ({"target_modules": ["embed_tokens"]}, 3, "embedding of 56 rows that is not the ba"),
    "cut": ({"target_modules": ["embed_tokens"]}, -3, "of 50 rows that is not the base's of 53"),
}


@pytest.mark.parametrize(("settings", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_an_embedding_adapted_otherwise_is_refused(settings, more, message, tmp_path):
    base = saved(peer(CASES["untied"]), tmp_path / "base")
    trained(base, tmp_path / "a", reading(ROWS + more), more, **settings)
    with pytest.raises(CheckpointError, match=message):
        ardor.load(base, adapter=tmp_path / "a")


def test_an_adapted_embedding_of_another_base_is_refused(tmp_path):
    """Its shapes fit, and PEFT replaces the base's table without a word."""
    first = saved(peer(CASES["untied"]), tmp_path / "base")
    other = saved(peer(CASES["untied"], seed=1), tmp_path / "other")
    trained(first, tmp_path / "a", reading(ROWS), target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="that is not the base's of 53"):
        ardor.load(other, adapter=tmp_path / "a")


def test_an_adapter_of_more_rows_beside_another_is_told_what_to_do(tmp_path):
    base = saved(peer(CASES["untied"]), tmp_path / "base")
    trained(base, tmp_path / "a", reading(56), 3, target_modules=["q_proj"])
    lm = ardor.load(base)
    with pytest.raises(CheckpointError, match=r"a table of 56 rows .* load this adapter as the mo"):
        lm.load_adapter(tmp_path / "a", "a")
    assert not [*lm.adapters]


def test_a_linear_that_is_adapted_as_a_parameter_is_a_linear(tmp_path):
    base, ids = saved(peer(CASES["untied"]), tmp_path / "base"), reading(ROWS)
    settings = {"target_modules": [], "target_parameters": ["gate_proj.weight"]}
    patterns = {"rank_pattern": {"0.mlp.gate_proj.weight": 2}}
    expected = trained(base, tmp_path / "a", ids, **settings, **patterns)
    lm = ardor.load(base, adapter=tmp_path / "a", dtype="float32")
    torch.testing.assert_close(lm.logits(ids), expected, rtol=1e-4, atol=1e-4)

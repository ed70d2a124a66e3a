"""A repaired copy passes the rules that it was repaired for, and the original stays as it was."""

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ardor
from ardor.doctor.repair import REPAIRS
from ardor.doctor.rules import RULES

from . import cases_text
from .cases_text import named
from .damage import EMBED, Case, edit, look, said, tokenizer, value, weights
from .test_rules import CASES as FILE_CASES


def digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


REPAIRABLE: list[tuple[str, Case]] = [
    (rule, case)
    for cases in (FILE_CASES, cases_text.CASES)
    for rule, of_rule in cases.items()
    if rule in REPAIRS and rule not in ("pickle-only",)
    for case in of_rule
]
# What takes a decision that nobody can take for the user.
BEYOND = (
    "bos_token is '<|endoftext|>'",  # which of the two is meant
    "no end after",  # with no EOS either
    "<|pad|>",  # with no token to spare
)


@pytest.mark.parametrize(("rule", "case"), REPAIRABLE)
def test_the_copy_passes_and_the_original_stays(chat, tmp_path, rule, case):
    case.change(chat)
    before = digest(chat)
    report = look(chat, fix=tmp_path / "fixed")
    repaired = report.repaired
    assert digest(chat) == before and said(report, rule) and repaired is not None
    left = [text for level, text in said(repaired.report, rule) if level == case.level]
    by_hand = case.says[-1] in BEYOND or (rule == "template-copies" and case.level == "I")
    assert by_hand or (rule in repaired.rules and not left), left
    # A remark may be new: an end that is written after the last answer alone is one.
    serious = [{f.rule for f in r.findings if f.level != "I"} for r in (report, repaired.report)]
    assert serious[1] <= serious[0]


def test_every_repair_is_of_a_rule():
    assert {*REPAIRS} <= {*RULES}
    assert {*REPAIRS} <= {rule for rule, _ in REPAIRABLE} | {"pickle-only", "tied-head"}


def test_weights_that_do_not_change_are_the_same_file(chat, tmp_path):
    edit("tokenizer_config.json", model_max_length=4096)(chat)
    look(chat, fix=tmp_path / "fixed")
    one, other = (folder / "model.safetensors" for folder in (chat, tmp_path / "fixed"))
    assert os.path.samefile(one, other)
    assert not os.path.samefile(chat / "config.json", tmp_path / "fixed" / "config.json")


def test_rows_begin_near_the_mean_and_all_others_stay(chat, tmp_path):
    value(EMBED, (slice(278, 280)), 0.0)(chat)
    look(chat, fix=tmp_path / "fixed")
    old, new = (load_file(f / "model.safetensors") for f in (chat, tmp_path / "fixed"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {EMBED}
    changed = (old[EMBED] != new[EMBED]).any(1).nonzero().flatten().tolist()
    assert changed == [278, 279] and not torch.equal(new[EMBED][278], new[EMBED][279])
    trained = torch.cat([old[EMBED][:278], old[EMBED][280:]])
    near = (new[EMBED][278] - trained.mean(0)).abs() <= 0.05 * trained.std(0)
    assert bool(near.all())


@pytest.mark.parametrize(
    "name", ["<|reserved_special_token_3|>", "[PAD]", "<|finetune_right_pad_id|>"]
)
def test_a_padding_token_is_one_that_the_vocabulary_has_to_spare(chat, tmp_path, name):
    tokenizer(lambda held: held["added_tokens"][1].update(content=name))(chat)
    named(pad_token="<|im_end|>")(chat)
    report = look(chat, fix=tmp_path / "fixed")
    assert report.repaired is not None and "pad-in-stops" in report.repaired.rules
    lm = ardor.load(tmp_path / "fixed")
    assert (lm.tokenizer.special.pad, lm.tokenizer.names["pad_token"]) == (277, name)
    assert not said(report.repaired.report, "begin-and-pad")


def test_a_head_that_differs_is_untied(chat, tmp_path):
    held = load_file(chat / "model.safetensors")
    save_file(held | {"lm_head.weight": held[EMBED] + 1}, chat / "model.safetensors")
    report = look(chat, fix=tmp_path / "fixed")
    assert report.repaired is not None and report.repaired.rules == ("tied-head",)
    lm = ardor.load(tmp_path / "fixed")
    assert torch.equal(lm.model.decoder.lm_head.weight, held[EMBED] + 1)


def test_pickles_become_safetensors_if_they_may_be_read(chat, tmp_path):
    held = load_file(chat / "model.safetensors")
    torch.save(held, chat / "pytorch_model.bin")
    (chat / "model.safetensors").unlink()
    look(chat, fix=tmp_path / "fixed", use_safetensors=False)
    new = load_file(tmp_path / "fixed" / "model.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in held.items())
    assert not (tmp_path / "fixed" / "pytorch_model.bin").exists()


def test_the_copy_loads_and_stops_at_the_same_tokens(chat, tmp_path):
    cases_text.ENDS_TEXT(chat)
    report = look(chat, fix=tmp_path / "fixed")
    assert report.exit_code == 0 and [f.rule for f in report.findings] == ["stop-token"]
    for name in ("config.json", "generation_config.json"):
        held = json.loads((tmp_path / "fixed" / name).read_text())
        assert held["eos_token_id"] == [279, 276]
    assert ardor.load(chat).model.stops.ids == ardor.load(tmp_path / "fixed").model.stops.ids


def test_a_folder_that_holds_something_is_refused(chat, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    with pytest.raises(ardor.ConfigError, match="holds something"):
        look(chat, fix=tmp_path / "there")
    with pytest.raises(ardor.ConfigError, match="holds something"):
        look(chat, fix=chat)
    assert (tmp_path / "there" / "x").read_text() == "mine"


def test_nothing_is_left_of_a_copy_that_fails(chat, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    value(EMBED, 279, 0.0)(chat)
    monkeypatch.setattr(import_module("ardor.doctor.repair"), "write_shard", full)
    with pytest.raises(ardor.CheckpointError, match="no space left"):
        look(chat, fix=tmp_path / "fixed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_what_has_no_repair_is_left_and_said(chat, tmp_path):
    weights(lambda held: held.pop("model.norm.weight"))(chat)
    report = look(chat, fix=tmp_path / "fixed")
    assert report.repaired is not None and report.repaired.rules == ()
    assert report.exit_code == 2 and said(report.repaired.report, "tensor-missing")

"""Rules about files, weights and ids: each finds what it is for, and nothing in what is well."""

import shutil
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

import ardor
from ardor.doctor.rules import RULES

from . import cases_text
from .damage import (
    EMBED,
    NORM,
    UP,
    Case,
    Change,
    check,
    cut_short,
    edit,
    look,
    pickled,
    said,
    sharded,
    shrunk,
    value,
    weights,
    write,
)

CASES: Mapping[str, list[Case]] = {
    "config-file": [
        Case(write("config.json", "{"), "E", ("config file", "not valid JSON")),
        Case(lambda m: (m / "config.json").unlink(), "E", ("does not exist",)),
        Case(write("generation_config.json", "[]"), "E", ("generation file", "JSON list")),
        Case(write("tokenizer.json", "{}"), "E", ("tokenizer file", "not a tokenizer")),
    ],
    "config-value": [
        Case(edit("config.json", hidden_act="mish"), "E", ("hidden_act='mish'",)),
        Case(edit("config.json", model_type="gpt5"), "E", ("model_type='gpt5'",)),
    ],
    "config-key": [
        Case(edit("config.json", clip_qkv=8, zap=[1]), "E", ("2 keys", "clip_qkv=8, zap=[1]"))
    ],
    "heads": [
        Case(
            edit("config.json", num_attention_heads=4, num_key_value_heads=3),
            "E",
            ("num_attention_heads=4, num_key_value_heads=3", "correct one"),
        )
    ],
    "weights-file": [
        Case(sharded, "E", ("lists model-00002-of", "download the missing shards")),
        Case(cut_short, "E", ("damaged or was cut short",)),
        Case(lambda m: (m / "model.safetensors").unlink(), "E", ("no model.safetensors or",)),
    ],
    "pickle-only": [Case(pickled, "W", ("pytorch_model.bin", "--no-use-safetensors"))],
    "tensor-missing": [
        Case(weights(lambda held: held.pop(UP)), "E", ("1 tensor missing", UP)),
        Case(edit("config.json", num_hidden_layers=3), "E", ("model.layers.2.", "and 1 more")),
    ],
    "tensor-unexpected": [
        Case(
            weights(lambda held: held.update(extra=torch.ones(2))),
            "E",
            ("1 tensor without", "extra"),
        )
    ],
    "tensor-shape": [
        Case(weights(lambda h: h.update({UP: torch.randn(3, 3)})), "E", (UP, "[3, 3]", "[24, 16]")),
        Case(
            edit("config.json", intermediate_size=20),
            "E",
            ("6 tensors unlike", "[24, 16]", "and 3 more"),
        ),
        Case(weights(lambda h: h.update({UP: h[UP].to(torch.int8)})), "E", (UP, "torch.int8")),
    ],
    "not-finite": [
        Case(value(UP, (slice(2), 3), torch.nan), "E", ("2 NaN and 0 infinite", UP, "model.safet")),
        Case(value(NORM, 0, -torch.inf), "E", ("0 NaN and 1 infinite values in 1 tensor", NORM)),
    ],
    "dead-tensor": [Case(value(UP, ..., 0.0), "W", ("1 matrix of zeros", UP))],
    "constant-rows": [
        Case(value(UP, 5, 0.25), "W", ("1 matrix with", f"{UP} (1 of 24 rows)")),
        Case(value(EMBED, slice(30, 40), 0.0), "W", ("10 of 320", "rows 30, 31", "never trained")),
        Case(value(EMBED, slice(280, 320), 0.0), "I", ("40 of 320", "none needed")),
    ],
    "outlier": [Case(value(EMBED, (3, 2), 900.0), "I", (f"{EMBED} (largest 900, rms 0.0",))],
    "float16-range": [Case(value(NORM, 0, 7e4), "W", (f"{NORM} (largest 7e+04)", "bfloat16"))],
    "config-dtype": [
        Case(edit("config.json", dtype="bfloat16"), "W", ("says bfloat16", "values in float32")),
        Case(edit("config.json", dtype=None, torch_dtype="float16"), "W", ("says float16",)),
    ],
    "vocabulary": [
        Case(shrunk(270), "E", ("276 ids", "only 270 rows", "resize_token_embeddings")),
        Case(shrunk(276), "E", ("EOS is token 276",)),
        Case(shrunk(279), "I", ("1 added token beyond", "'<|im_end|>' (id 279)")),
    ],
    "special-ids": [
        Case(
            edit("config.json", pad_token_id=-1), "W", ("pad_token_id in config.json", "0 to 319")
        ),
        Case(edit("generation_config.json", eos_token_id=320), "E", ("no text would end by it",)),
        Case(edit("config.json", eos_token_id=[276, 900]), "W", ("eos_token_id=[276, 900]",)),
    ],
}

# Near misses: what looks alike, and is well.
WELL: Mapping[str, Change] = {
    "config-key": edit("config.json", sliding_window=None, task_specific_params={"a": 1}),
    "heads": edit("config.json", num_key_value_heads=2),
    "pickle-only": lambda m: torch.save({"a": torch.ones(1)}, m / "pytorch_model.bin"),
    "tensor-unexpected": weights(
        lambda held: held.update({"model.rotary_emb.inv_freq": torch.ones(4)})
    ),
    "dead-tensor": value(NORM, ..., 0.0),
    "constant-rows": value(UP, (5, slice(1, None)), 0.25),
    "outlier": value(UP, (3, 2), 1.0),
    "float16-range": value(NORM, 0, 65504.0),
    "config-dtype": edit("config.json", dtype=None, torch_dtype="torch.float32"),
    "special-ids": edit("config.json", pad_token_id=319, bos_token_id=None),
}


def test_nothing_is_found_in_a_model_that_is_well(model):
    report = look(model)
    assert report.findings == () and report.worst is None
    assert report.rules == tuple(RULES) and report.tensors == 20
    assert report.bytes == sum(t.nbytes for t in load_file(model / "model.safetensors").values())
    ardor.load(model)


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        pytest.param(rule, case, id=f"{rule}-{i}")
        for rule, cases in CASES.items()
        for i, case in enumerate(cases)
    ],
)
def test_a_rule_finds_what_it_is_for(model, rule, case):
    case.change(model)
    found = said(look(model), rule)
    assert [level for level, _ in found] == [case.level]
    assert all(part in found[0][1] for part in case.says), found


TEXT = [(rule, case) for rule, cases in cases_text.CASES.items() for case in cases]


@pytest.mark.parametrize(("rule", "case"), TEXT)
def test_a_rule_about_text_finds_what_it_is_for(chat, rule, case):
    case.change(chat)
    check(look(chat), rule, case)


@pytest.mark.parametrize("rule", cases_text.WELL)
def test_a_rule_about_text_leaves_what_only_looks_alike(chat, rule):
    cases_text.WELL[rule](chat)
    assert not said(look(chat), rule)


def test_nothing_is_found_in_a_chat_model_that_is_well(chat):
    report = look(chat)
    assert report.findings == ()
    facts = dict(report.facts)
    assert facts["ends"].startswith("<|im_end|> (279): the chat template's terminator")
    assert "40 rows belong to no token" in facts["ids"] and "of its own" in facts["padding"]
    assert facts["template"].endswith("writes <|im_start|> <|im_end|>")


@pytest.mark.parametrize("rule", WELL)
def test_a_rule_leaves_what_only_looks_alike(model, rule):
    WELL[rule](model)
    assert not said(look(model), rule)


def test_whatever_keeps_a_model_from_loading_is_an_error_and_nothing_else_is(model):
    """Doctor and `load` judge alike, but for weights that only training refuses."""
    keep = model.with_name("keep")
    shutil.copytree(model, keep)
    for rule, cases in CASES.items():
        for case in cases:
            shutil.rmtree(model)
            shutil.copytree(keep, model)
            case.change(model)
            errors = [f.rule for f in look(model).findings if f.level == "E"]
            try:
                ardor.load(model)
            except ardor.ArdorError:
                assert errors or rule == "pickle-only", rule
            else:
                assert {*errors} <= {"not-finite", "special-ids"}, rule


def test_an_adapter_s_own_weights_are_looked_at(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    file = tmp_path / "adapter_model.safetensors"
    a, b = (f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB")
    save_file({a: torch.randn(2, 16), b: torch.randn(24, 2)}, file)
    report = look(tmp_path)
    (found,) = report.findings
    assert (found.rule, found.level, found.evidence) == ("adapter-base", "I", "base: owner/base")
    assert report.tensors == 2
    save_file({a: torch.randn(2, 16), b: torch.zeros(24, 2)}, file)
    ((_, text),) = said(look(tmp_path), "dead-tensor")
    assert b in text and "the adapter changes nothing there" in text
    file.unlink()
    assert said(look(tmp_path), "weights-file")[0][0] == "E"


def test_pickles_are_looked_into_when_asked(model):
    value(UP, (0, 0), torch.nan)(model)
    pickled(model)
    assert not said(look(model), "not-finite")
    report = look(model, use_safetensors=False)
    assert UP in said(report, "not-finite")[0][1] and said(report, "pickle-only")


def test_headers_alone_say_nothing_of_values(model):
    value(UP, (0, 0), torch.nan)(model)
    report = look(model, weights=False)
    assert (report.findings, report.tensors, report.bytes) == ((), 0, 0)


def test_findings_come_worst_first_and_progress_ends_with_all(model):
    for change in (edit("config.json", clip_qkv=8), value(EMBED, (3, 2), 7e4)):
        change(model)
    seen: list[tuple[int, int]] = []
    report = look(model, progress=lambda *done: seen.append(done))
    assert [found.level for found in report.findings] == ["E", "W", "I"]
    assert report.worst == "E" and seen[-1] == (report.bytes, report.bytes)
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)


def test_no_such_model_is_an_error_of_ours(tmp_path):
    with pytest.raises(ardor.CheckpointError, match="is not a directory"):
        look(tmp_path / "nowhere")

"""Each rule of doctor finds what it is for, and nothing in a model that is well."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ardor
from ardor.doctor import Report
from ardor.doctor.rules import RULES
from ardor.files.runs import newest_checkpoint
from ardor.files.weights import write_weights

from ..tiny import make_base

UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base, tmp_path) -> Path:
    """A copy of the base model to damage."""
    newest = newest_checkpoint(base)
    assert newest is not None
    shutil.copytree(newest, tmp_path / "model")
    return tmp_path / "model"


Change = Callable[[Path], object]


def weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(model: Path) -> None:
        held = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
        change(held)
        save_file(held, model / "model.safetensors")

    return apply


def value(name: str, where: Any, new: float) -> Change:
    def change(held: dict[str, Tensor]) -> None:
        held[name][where] = new

    return weights(change)


def edit(file: str, **keys: Any) -> Change:
    def apply(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return apply


def write(file: str, text: str) -> Change:
    return lambda model: (model / file).write_text(text)


def shrunk(rows: int) -> Change:
    def apply(model: Path) -> None:
        weights(lambda held: held.update({EMBED: held[EMBED][:rows].clone()}))(model)
        edit("config.json", vocab_size=rows)(model)

    return apply


def sharded(model: Path) -> None:
    write_weights(model, load_file(model / "model.safetensors"), max_shard_bytes=20_000)
    sorted(model.glob("model-*-of-*.safetensors"))[1].unlink()


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


class Case(NamedTuple):
    """What to do to a model, and what is then said of it."""

    change: Change
    level: str
    says: tuple[str, ...]  # parts of what, evidence or fix


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
    "ends": [
        Case(edit("generation_config.json", eos_token_id=[276, 5]), "I", ("5, 276",)),
        Case(edit("generation_config.json", eos_token_id=5), "W", ("none of them in all", ": 5")),
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
    "ends": edit("config.json", eos_token_id=[276]),
}


def said(report: Report, rule: str) -> list[tuple[str, str]]:
    return [
        (found.level, f"{found.what}\n{found.evidence}\n{found.fix}")
        for found in report.findings
        if found.rule == rule
    ]


def test_nothing_is_found_in_a_model_that_is_well(model):
    report = ardor.doctor(model)
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
    found = said(ardor.doctor(model), rule)
    assert [level for level, _ in found] == [case.level]
    assert all(part in found[0][1] for part in case.says), found


@pytest.mark.parametrize("rule", WELL)
def test_a_rule_leaves_what_only_looks_alike(model, rule):
    WELL[rule](model)
    assert not said(ardor.doctor(model), rule)


def test_every_rule_has_a_case():
    assert {*CASES, "adapter-base"} == {*RULES}


def test_whatever_keeps_a_model_from_loading_is_an_error_and_nothing_else_is(model):
    """Doctor and `load` judge alike, but for weights that only training refuses."""
    keep = model.with_name("keep")
    shutil.copytree(model, keep)
    for rule, cases in CASES.items():
        for case in cases:
            shutil.rmtree(model)
            shutil.copytree(keep, model)
            case.change(model)
            errors = [f.rule for f in ardor.doctor(model).findings if f.level == "E"]
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
    report = ardor.doctor(tmp_path)
    (found,) = report.findings
    assert (found.rule, found.level, found.evidence) == ("adapter-base", "I", "base: owner/base")
    assert report.tensors == 2
    save_file({a: torch.randn(2, 16), b: torch.zeros(24, 2)}, file)
    ((_, text),) = said(ardor.doctor(tmp_path), "dead-tensor")
    assert b in text and "the adapter changes nothing there" in text
    file.unlink()
    assert said(ardor.doctor(tmp_path), "weights-file")[0][0] == "E"


def test_pickles_are_looked_into_when_asked(model):
    value(UP, (0, 0), torch.nan)(model)
    pickled(model)
    assert not said(ardor.doctor(model), "not-finite")
    report = ardor.doctor(model, use_safetensors=False)
    assert UP in said(report, "not-finite")[0][1] and said(report, "pickle-only")


def test_headers_alone_say_nothing_of_values(model):
    value(UP, (0, 0), torch.nan)(model)
    report = ardor.doctor(model, weights=False)
    assert (report.findings, report.tensors, report.bytes) == ((), 0, 0)


def test_findings_come_worst_first_and_progress_ends_with_all(model):
    for change in (edit("config.json", clip_qkv=8), value(EMBED, (3, 2), 7e4)):
        change(model)
    seen: list[tuple[int, int]] = []
    report = ardor.doctor(model, progress=lambda *done: seen.append(done))
    assert [found.level for found in report.findings] == ["E", "W", "I"]
    assert report.worst == "E" and seen[-1] == (report.bytes, report.bytes)
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)


def test_no_such_model_is_an_error_of_ours(tmp_path):
    with pytest.raises(ardor.CheckpointError, match="is not a directory"):
        ardor.doctor(tmp_path / "nowhere")

"""`ardor doctor` from its command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardor.cli import console
from ardor.cli.main import main

from ..tiny import copy_of, make_base, write_rows

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base, tmp_path) -> Path:
    return copy_of(base, tmp_path / "model")


def damage(model: Path, what: float) -> None:
    held = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
    held[UP][0] = what
    save_file(held, model / "model.safetensors")


def test_the_exit_code_is_the_worst_that_was_found(base, model, capsys):
    assert main(["doctor", str(base)]) == 0
    assert "0 errors, 0 warnings, 1 remark by" in capsys.readouterr().out  # ids without a token
    damage(model, 0.5)
    assert main(["doctor", str(model)]) == 1
    damage(model, torch.nan)
    assert main(["doctor", str(model)]) == 2
    said = capsys.readouterr()
    assert "not-finite" in said.out and "16 NaN and 0 infinite" in said.out
    assert "20 tensors read" in said.err
    assert main(["doctor", str(model), "--no-weights"]) == 0
    assert main(["doctor", str(model / "nowhere")]) == 2


def test_json_is_one_document(model, capsys):
    damage(model, torch.nan)
    assert main(["doctor", str(model), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"error": 1, "warning": 0, "info": 0} and found["exit_code"] == 2
    (one,) = found["findings"]
    assert one["rule"] == "not-finite" and one["level"] == "E" and UP in one["evidence"]
    assert one["fix"] and "not-finite" in found["rules"] and found["tensors"] == 20


@pytest.mark.parametrize("width", [60, 100])
def test_a_table_keeps_to_the_width_and_loses_nothing(model, capsys, monkeypatch, width):
    monkeypatch.setattr(console, "PLAIN_WIDTH", width)
    damage(model, torch.nan)
    main(["doctor", str(model)])
    lines = capsys.readouterr().out.splitlines()
    table = lines[:-1]  # the last is one line in a pipe, however long
    assert table and max(map(len, table)) <= width
    assert UP in "".join("".join(table).split()) and "fix:" in "".join(table)


def test_progress_is_shown_only_where_it_takes_a_while(model, capsys, monkeypatch):
    main(["doctor", str(model)])
    assert "reading weights" not in capsys.readouterr().err
    monkeypatch.setattr(console, "QUIET", 0.0)
    main(["doctor", str(model)])
    assert "reading weights (MiB)  1/1" in capsys.readouterr().err


def test_data_and_what_the_model_makes_of_it_are_shown(model, tmp_path, capsys):
    rows = [{"prompt": f"the cat {i}: ", "completion": " sat"} for i in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["doctor", str(model), "--data", str(data), "--no-probe"]) == 1
    said = capsys.readouterr()
    assert "prompt-space" in said.out and "6: 6 prompt-completion" in said.out
    assert " 0-" in said.out and "######" in said.out and "probe: not run" in said.err
    assert (
        main(["doctor", str(model), "--data", str(data), "--json", "--eval-data", str(data)]) == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["examples"] == 6 and sum(found["data"]["lengths"].values()) == 6
    assert {"held-out-leak", "prompt-space"} <= {one["rule"] for one in found["findings"]}
    assert found["probe"]["answers"][0]["stop_reason"] and found["facts"]["padding"]
    assert main(["doctor", str(model), "--data", str(tmp_path / "no.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_conversations_are_read_as_training_would_for_a_model_without_a_template(
    base, tmp_path, capsys
):
    words = ["who ran", "the dog ran"]
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), words, strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert main(["doctor", str(base), "--data", str(data), "--no-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["targets"] > 0
    assert found["facts"]["template"] == "none; conversations would be learnt in ChatML"
    assert main(["doctor", str(base), "--no-probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["template"] == "none"


def test_a_repaired_copy_is_written_and_its_code_is_the_answer(model, tmp_path, capsys):
    edit = json.loads((model / "generation_config.json").read_text()) | {"eos_token_id": 5}
    (model / "generation_config.json").write_text(json.dumps(edit))
    assert main(["doctor", str(model), "--no-probe"]) == 1
    fixed = tmp_path / "fixed"
    assert main(["doctor", str(model), "--no-probe", "--fix", "-o", str(fixed)]) == 0
    assert f"repaired in {fixed}: ends" in capsys.readouterr().out
    assert main(["doctor", str(fixed), "--no-probe"]) == 0
    assert main(["doctor", str(model), "--fix", "-o", str(tmp_path / "f2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["repaired"]["rules"] == ["ends"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--fix"], "give both or neither"),
        (["-o", "x"], "give both or neither"),
        (["--rows", "0"], "at least 1"),
        (["--max-length", "0"], "max_length=0 must be at least 1"),
        (["--eval-data", "x"], "give --data too"),
        (["--run", "nowhere"], "is no folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(model, capsys, flags, says):
    assert main(["doctor", str(model), "--no-probe", *flags]) == 2
    assert says in capsys.readouterr().err

"""`ardor doctor` from its command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardor.cli import console, doctor
from ardor.cli.main import main
from ardor.files.runs import newest_checkpoint

from ..tiny import make_base

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base, tmp_path) -> Path:
    newest = newest_checkpoint(base)
    assert newest is not None
    shutil.copytree(newest, tmp_path / "model")
    return tmp_path / "model"


def damage(model: Path, what: float) -> None:
    held = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
    held[UP][0] = what
    save_file(held, model / "model.safetensors")


def test_the_exit_code_is_the_worst_that_was_found(base, model, capsys):
    assert main(["doctor", str(base)]) == 0
    assert "0 errors, 0 warnings, 0 remarks by" in capsys.readouterr().out
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
    monkeypatch.setattr(doctor, "QUIET", 0.0)
    main(["doctor", str(model)])
    assert "reading weights (MiB)  1/1" in capsys.readouterr().err

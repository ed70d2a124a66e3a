"""`ardor plan` from its command line."""

import json

import pytest

from ardor.cli import console
from ardor.cli.main import main

BIG = ["--gpus", "none", "--ram", "4000GiB"]
SOME = ["--gpus", "none", "--ram", "16GiB"]
TINY = ["--gpus", "none", "--ram", "256MiB"]


@pytest.mark.parametrize(("machine", "code"), [(BIG, 0), (SOME, 1), (TINY, 2)])
def test_the_exit_code_is_whether_it_fits(machine, code, capsys):
    command = ["plan", "llama-2-7b", "--for", "generate", "--dtype", "float32", *machine]
    assert main(command) == code
    said = capsys.readouterr().out
    assert ("does not fit" in said) == (code != 0)
    assert ("cheapest that fits:" in said) == (code == 1)
    assert ("nothing that ardor can do" in said) == (code == 2)


def test_json_has_the_terms_and_the_code(capsys):
    assert main(["plan", "tinyllama-1.1b", "--method", "full", *SOME, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    asked, least = found["asked"], found["cheapest"]
    assert found["exit_code"] == 1 and not asked["fits"] and least["fits"] and least["changes"]
    assert asked["bytes"] == sum(asked["terms"].values())
    assert least["bytes"] < asked["bytes"]
    assert found["device_map"] == {"": "cpu"} and found["largest_batch"] >= 1


def test_an_unknown_model_is_the_users_mistake(capsys, tmp_path):
    assert main(["plan", str(tmp_path / "no" / "where" / "x"), *SOME]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpus", "2"], "gpus: '2' names no unit; give 2x24GiB, or 24GiB"),
        (["--gpus", "2x24"], "gpus: '2x24' names no unit"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--max-length", "-1"], "max_length=-1 must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0 must be at least"),
    ],
)
def test_a_number_of_no_sense_is_refused(flags, says, capsys):
    assert main(["plan", "llama-15m", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 100])
def test_no_line_is_broken_by_a_narrow_terminal(width, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_WIDTH", width)
    assert main(["plan", "llama-15m", *SOME]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[2 : next(i for i, line in enumerate(lines) if line.startswith("peak ")) + 1]
    assert all(len(line.rstrip()) <= width for line in table)
    assert table[0].startswith("process") and any("#" in line for line in table)

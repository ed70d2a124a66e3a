"""`ardor.train` and `ardor.finetune` from Python."""

import sys
from dataclasses import replace

import pytest

import ardor
from ardor.errors import ConfigError
from ardor.files.runs import newest_checkpoint
from ardor.files.yaml import read_yaml
from ardor.tuning import Trained

from ..tiny import SIZES
from .conftest import figures, finish, prepare, tune_config

pytestmark = pytest.mark.sweep


def test_a_run_from_python_goes_to_the_end_and_loads(texts, tmp_path, capfd):
    done = ardor.train(
        texts, output=str(tmp_path / "run"), max_steps=4, eval_fraction=0.1, eval_steps=2, **SIZES
    )
    assert isinstance(done, Trained) and done.steps == 4 and not done.stopped_early
    assert [event["step"] for event in done.evaluations] == [2, 4]
    assert done.checkpoint == newest_checkpoint(tmp_path / "run")
    assert done.load().generate("the cat", max_new_tokens=3).text is not None
    said = capfd.readouterr()
    assert "step 4/4: loss" in said.err and not said.out


def test_python_and_the_command_line_are_one(base, pairs, tmp_path, capfd):
    from ardor.cli.main import main

    flags = ["--max-steps", "2", "--target-modules", "q_proj", "v_proj", "--dtype", "float32"]
    typed = tmp_path / "typed"
    assert main(["finetune", str(base("llama")), str(pairs), "-o", str(typed), *flags]) == 0
    called = ardor.finetune(
        base("llama"),
        pairs,
        output=tmp_path / "called",
        max_steps=2,
        target_modules=["q_proj", "v_proj"],
        dtype="float32",
        progress=False,
    )
    assert figures(called.folder) == figures(typed)


def test_events_are_drawn_and_the_run_stopped_from_them(base, pairs, tmp_path):
    run = ardor.finetune_run(str(base("llama")), pairs, output=tmp_path / "run", max_steps=9)
    for event in run.events():
        if event["kind"] == "train" and event["step"] == 3:
            run.trainer.stop_requested = True
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-3"


def test_a_setting_that_there_is_none_of_is_told_with_the_nearest(base, pairs):
    with pytest.raises(ConfigError, match=r"unknown setting 'learning_rat'; did you mean 'learn"):
        ardor.finetune(base("llama"), pairs, learning_rat=1e-4)
    assert ardor.finetune.__module__ == "ardor.tuning"  # and the package is still there

    assert "ardor.train.config" in sys.modules


def test_the_dtype_census_of_qlora_stays_with_the_run(base, pairs, tmp_path):
    config = tune_config(base("llama"), pairs, tmp_path / "run", method="qlora", max_steps=2)
    run = prepare(config)
    finish(run)
    told = [note for note in run.notes if note.startswith("k-bit")]
    assert len(told) == 3 and "float32" in told[1]
    head = (tmp_path / "run" / "config.yaml").read_text()
    assert all(f"# {note}\n" in head for note in told)
    prepare(replace(config, resume=True))
    assert (tmp_path / "run" / "config.yaml").read_text() == head
    # Said to be settings by no reader: the run goes on from the file itself.
    assert read_yaml(tmp_path / "run" / "config.yaml").values["method"] == "qlora"

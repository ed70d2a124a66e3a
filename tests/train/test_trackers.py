"""Metrics that go to other people's dashboards: TensorBoard itself, and doubles of the others."""

import json
import sys
from types import SimpleNamespace

import pytest

from ardor.errors import ConfigError
from ardor.train.config import Finetune, Train
from ardor.train.pretrain import prepare as prepare_training
from ardor.train.watchdog import Diverged

from ..tiny import SIZES
from .conftest import figures, finish, prepare

pytestmark = pytest.mark.sweep


class Page:
    """What wandb and trackio have in common, and what each has beside it."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None):
        self.begun, self.rows, self.ends, self.refusal = [], [], [], refusal

    def login(self):
        if self.refusal is not None:
            raise self.Error(self.refusal)

    def init(self, **given):
        print("* Created a run")  # as trackio does, on stdout
        self.begun.append(given)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self, exit_code=0):
        print("* Run finished")
        self.ends.append(exit_code)

    def Table(self, columns, data):
        return SimpleNamespace(columns=columns, data=data)


def settings(texts, run, name: str, **more) -> Train:
    return Train(
        data=str(texts), output=run, report_to=(name,), **{"max_steps": 2, **SIZES, **more}
    )


def pages(run) -> list[tuple[str, int, float]]:
    """(name, step, value) of everything that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return [
        (name, event.step, event.value)
        for name in read.Tags()["scalars"]
        for event in read.Scalars(name)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_every_number_once_also_of_a_run_that_was_cut_and_resumed(
    texts, tmp_path
):
    run = tmp_path / "run"
    config = settings(texts, run, "tensorboard", max_steps=4, save_steps=2)
    for event in prepare_training(config).events():
        if event["step"] == 3:
            break  # after the checkpoint of step 2, as if it was killed
    assert ("train/loss", 3) in {found[:2] for found in pages(run)}  # of a step that was lost
    finish(prepare_training(Train(**{**vars(config), "resume": True})))
    shown = [(step, value) for name, step, value in pages(run) if name == "train/loss"]
    rows = [row for row in figures(run) if row["kind"] == "train"]
    assert shown == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert [step for step, _ in shown] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_dashboards_get_every_row_the_settings_and_the_samples(
    texts, tmp_path, monkeypatch, capsys, name
):
    page = Page()
    monkeypatch.setitem(sys.modules, name, page)
    config = settings(texts, tmp_path / "a", name, sample_prompts=("the",), eval_steps=1)
    finish(prepare_training(config))
    assert [step for step, values in page.rows if "train/loss" in values] == [1, 2]
    assert any("memory/peak_memory" in values for _, values in page.rows)
    # All of the settings, those too that a resumed run may change.
    assert page.begun[0]["config"]["data"] == [str(texts)]
    assert page.begun[0]["config"]["eval_steps"] == 1
    tables = [values["samples"].data for _, values in page.rows if "samples" in values]
    written = [row for row in figures(tmp_path / "a") if row["kind"] == "sample"]
    assert tables[-1] == [[row["step"], "the", row["text"]] for row in written]
    assert len(tables[-1]) == 2 and page.ends == [0]
    assert capsys.readouterr().out == ""  # stdout is for --json


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_its_own_and_another_of_the_same_name_does_not(
    texts, tmp_path, monkeypatch, name
):
    page = Page()
    monkeypatch.setitem(sys.modules, name, page)
    config = settings(texts, tmp_path / "a", name, sample_prompts=("the",), eval_steps=1)
    run = prepare_training(config)
    run.trainer.stop_requested = True
    finish(run)
    finish(prepare_training(Train(**{**vars(config), "resume": True})))
    finish(prepare_training(settings(texts, tmp_path / "elsewhere" / "a", name)))
    key = "id" if name == "wandb" else "name"
    known = [given[key] for given in page.begun]
    assert known[0] == known[1] != known[2]
    assert all(given["resume"] == "allow" for given in page.begun)
    last = [values["samples"].data for _, values in page.rows if "samples" in values][-1]
    assert [step for step, *_ in last] == [1, 2]


def test_the_samples_of_before_stay_in_the_table_of_a_resumed_run(texts, tmp_path, monkeypatch):
    page = Page()
    monkeypatch.setitem(sys.modules, "wandb", page)
    config = settings(texts, tmp_path / "a", "wandb", sample_prompts=("the",), eval_steps=1)
    run = prepare_training(config)
    for event in run.events():
        if event["kind"] == "train":
            run.trainer.stop_requested = True
    page.rows.clear()
    finish(prepare_training(Train(**{**vars(config), "resume": True})))
    tables = [values["samples"].data for _, values in page.rows if "samples" in values]
    assert [[step for step, *_ in table] for table in tables] == [[1, 2]]


def test_the_project_is_what_the_environment_says(texts, tmp_path, monkeypatch):
    page = Page()
    monkeypatch.setitem(sys.modules, "wandb", page)
    finish(prepare_training(settings(texts, tmp_path / "a", "wandb")))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    finish(prepare_training(settings(texts, tmp_path / "b", "wandb")))
    assert [given["project"] for given in page.begun] == ["ardor", "mine"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_anything_is_read_or_written(
    texts, base, pairs, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    told = rf"report_to={name} needs the package .*pip install 'ardor\[trackers\]'"
    with pytest.raises(ConfigError, match=told):
        prepare_training(settings(texts, tmp_path / "a", name))
    with pytest.raises(ConfigError, match=told):
        prepare(
            Finetune(
                model=str(base("llama")),
                data=str(pairs),
                output=tmp_path / "a",
                report_to=(name,),
            )
        )
    assert not (tmp_path / "a").exists()


def test_whoever_is_not_logged_in_is_told_before_a_folder_is_there(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Page("No API key configured."))
    told = "report_to=wandb cannot begin: No API key configured; .*WANDB_MODE=offline"
    with pytest.raises(ConfigError, match=told):
        prepare_training(settings(texts, tmp_path / "a", "wandb"))
    assert not (tmp_path / "a").exists()


def test_a_run_that_went_wrong_ends_so_on_its_dashboard_and_in_its_report(
    texts, tmp_path, monkeypatch
):
    page = Page()
    monkeypatch.setitem(sys.modules, "wandb", page)
    config = settings(texts, tmp_path / "a", "wandb", max_steps=60, learning_rate=1e6)
    with pytest.raises(Diverged) as stopped:
        finish(prepare_training(config))
    assert page.ends == [1]
    rows = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["kind"] == "stopped" and rows[-1]["text"] == str(stopped.value)
    assert "Stopped: " in (tmp_path / "a" / "report.html").read_text()

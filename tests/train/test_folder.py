"""The folder of a run: one process at a time, and what was chosen when it began stays."""

import json
import os
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from ardor.errors import ConfigError
from ardor.files.runs import BEST, checkpoints, chosen_checkpoint
from ardor.text import template as template_module
from ardor.text.template import ChatTemplate
from ardor.train import finetune

from ..tiny import write_rows
from .conftest import finish, prepare, train_config, tune_config
from .ends import contents

pytestmark = pytest.mark.sweep


def cut_to(run: Path, *names: str) -> None:
    """As if it had been killed: only these checkpoints are left."""
    for path in checkpoints(run):
        if path.name not in names:
            shutil.rmtree(path)


# --- two at once ---


def test_a_folder_in_which_a_run_goes_on_is_refused(texts, tmp_path):
    config = train_config(texts, tmp_path / "run")
    events = prepare(config).events()
    while next(events)["kind"] != "checkpoint":
        pass
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="run is in use by another run; wait"):
        prepare(replace(config, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    events.close()
    finish(prepare(replace(config, resume=True)))


@pytest.mark.parametrize("resume", [False, True])
def test_what_another_process_did_since_the_folder_was_looked_at_is_noticed(
    texts, tmp_path, monkeypatch, resume
):
    """Weights of one checkpoint with the optimizer of the next would be nobody's run."""
    from ardor.train import pretrain

    config = train_config(texts, tmp_path / "run")
    if resume:
        finish(prepare(config))
        cut_to(tmp_path / "run", "checkpoint-2")
        shutil.copytree(tmp_path / "run", tmp_path / "ahead")
        finish(prepare(replace(config, output=tmp_path / "ahead", resume=True)))
    real = pretrain.choose_attention

    def meanwhile(*given):
        if resume:
            shutil.copytree(tmp_path / "ahead" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
        else:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "config.yaml").write_text("")
        return real(*given)

    # After the weights were loaded; the trainer's state comes later.
    monkeypatch.setattr(pretrain, "choose_attention", meanwhile)
    with pytest.raises(ConfigError, match="another process has just trained in"):
        prepare(replace(config, resume=resume))


# --- the end, again ---


def test_resuming_a_finished_run_mends_its_report_and_measures_nothing(texts, tmp_path):
    config, run = train_config(texts, tmp_path / "run"), tmp_path / "run"
    finish(prepare(config))
    metrics, report = (run / "metrics.jsonl").read_bytes(), (run / "report.html").read_bytes()
    assert b'"kind": "memory"' in metrics
    (run / "report.html").write_text("that of an earlier checkpoint")
    assert finish(prepare(replace(config, resume=True))) == []
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert (run / "report.html").read_bytes() == report


def test_the_best_checkpoint_that_was_removed_is_told_and_judged_afresh(texts, tmp_path):
    run = tmp_path / "run"
    config = train_config(texts, run, load_best_model_at_end=True, max_steps=6)
    finish(prepare(config))
    cut_to(run, "checkpoint-4")
    state = run / "checkpoint-4" / "trainer.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_step": 2, "best_loss": 0.1}))
    events = finish(prepare(replace(config, resume=True)))
    assert "the best checkpoint so far was that of step 2, which is not there" in events[0]["text"]
    assert json.loads((run / BEST).read_text())["checkpoint"] == "checkpoint-6"


def test_a_run_that_goes_on_has_no_best_checkpoint_until_it_ends(texts, tmp_path):
    run = tmp_path / "run"
    settings = {"load_best_model_at_end": True, "early_stopping_patience": 1, "max_steps": 8}
    config = train_config(texts, run, early_stopping_threshold=9.0, **settings)
    finish(prepare(config))
    assert chosen_checkpoint(run) == run / "checkpoint-2"  # and stopped at step 4
    later = prepare(replace(config, resume=True, early_stopping_patience=9)).events()
    next(later)
    assert chosen_checkpoint(run) == run / "checkpoint-4"
    later.close()


def test_metrics_reach_the_disk_before_the_checkpoint_that_counts_them(
    texts, tmp_path, monkeypatch
):
    synced: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    events = prepare(train_config(texts, tmp_path / "run")).events()
    monkeypatch.setattr(os, "fsync", noted)
    while next(events)["kind"] != "checkpoint":
        pass
    events.close()
    assert synced.index("metrics.jsonl") < synced.index("trainer.safetensors")


# --- what was chosen when it began ---

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)


def test_a_template_that_writes_the_day_writes_that_of_the_beginning(base, tmp_path, monkeypatch):
    """Else the run that is resumed on another day reads other data, and is refused."""
    days = iter((datetime(2026, 11, 29, 23, 59), datetime(2026, 11, 30)))
    begin = ChatTemplate.__init__

    def on(day):
        def made(self, *given, **named):
            begin(self, *given, **{"clock": lambda: day, **named})

        monkeypatch.setattr(template_module.ChatTemplate, "__init__", made)

    (tmp_path / "dated.jinja").write_text(DATED)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": said}] * 6)
    settings = {"chat_template": str(tmp_path / "dated.jinja"), "eval_fraction": 0.0}
    config = tune_config(base("llama"), rows, tmp_path / "run", max_steps=4, **settings)
    on(next(days))
    finish(finetune.prepare(config))
    whole = contents(checkpoints(tmp_path / "run")[-1])
    assert "template_date: 2026-11-29" in (tmp_path / "run" / "config.yaml").read_text().replace(
        "'", ""
    )
    on(next(days))
    cut_to(tmp_path / "run", "checkpoint-2")
    finish(finetune.prepare(replace(config, resume=True)))
    assert contents(checkpoints(tmp_path / "run")[-1]) == whole
    other = finetune.prepare(replace(config, output=tmp_path / "other"))
    assert other.train.fingerprint != json.loads(whole["trainer.json"])["dataset"]


def test_a_day_that_is_none_is_refused(base, pairs, tmp_path):
    with pytest.raises(ConfigError, match="template_date=30.11.2026 is no day; give one as 2026"):
        tune_config(base("llama"), pairs, tmp_path / "run", template_date="30.11.2026")


def test_a_reference_computed_because_of_an_adapter_is_found_without_its_flag(base, tmp_path):
    rows = [{"prompt": "the", "chosen": f" cat {i}", "rejected": f" dog {i}"} for i in "abcdefgh"]
    judged = write_rows(tmp_path / "judged.jsonl", rows)
    settings = {"objective": "dpo", "init_lora_weights": "pissa", "eval_fraction": 0.0}
    config = tune_config(base("llama"), judged, tmp_path / "run", max_steps=4, **settings)
    finish(finetune.prepare(config))
    whole = contents(checkpoints(tmp_path / "run")[-1])
    cut_to(tmp_path / "run", "checkpoint-2")
    finish(finetune.prepare(replace(config, resume=True)))
    assert contents(checkpoints(tmp_path / "run")[-1]) == whole

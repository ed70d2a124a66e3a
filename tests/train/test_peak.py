"""Runs foretell the memory they take, and record what they took."""

import json

import pytest

from ardor.errors import ConfigError
from ardor.memory.machine import Machine, peak_resident
from ardor.train import finetune, peak
from ardor.train.config import Finetune


def config(base, pairs, output, **keys) -> Finetune:
    keys = {"max_steps": 2, "lora_r": 2, "dtype": "float32", **keys}
    return Finetune(model=str(base), data=str(pairs), output=output, **keys)


def test_a_run_ends_with_its_predicted_and_measured_peak(base, pairs, tmp_path):
    run = finetune.prepare(config(base("llama"), pairs, tmp_path / "run"))
    assert any(note.startswith("memory: about ") for note in run.notes)
    last = list(run.events())[-1]
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(written[-1]) == last
    assert (last["kind"], last["step"]) == ("memory", 2)
    now = peak_resident()
    assert now is not None and 2**26 < last["peak_memory"] <= now
    assert last["predicted_memory"] == run.predicted


def test_a_longer_micro_batch_is_predicted_to_take_more(base, pairs, tmp_path):
    few, many = (
        finetune.prepare(
            config(base("llama"), pairs, tmp_path / str(size), per_device_train_batch_size=size)
        ).predicted
        for size in (1, 8)
    )
    assert few is not None and many is not None and few < many


def test_what_cannot_fit_is_refused_before_it_is_loaded(base, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "this_machine", lambda: Machine((), 2**20))
    monkeypatch.setattr(finetune, "load_model", None)
    with pytest.raises(ConfigError, match="lora fine-tuning of .* takes about .* there are 1 MiB"):
        finetune.prepare(config(base("llama"), pairs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()

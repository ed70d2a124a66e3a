"""Runs foretell the memory they take, and record what they took."""

import json
import os

import pytest
import torch

from ardor.errors import ConfigError
from ardor.memory.machine import Machine, peak_resident
from ardor.memory.products import KEPT, VARIABLES
from ardor.train import finetune, peak, run
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


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system lets no peak be forgotten"
)
def test_a_run_s_peak_is_its_own_and_what_was_held_before_is_told(base, pairs, tmp_path):
    before = torch.ones(400 << 18)  # 400 MiB
    held = peak_resident()
    del before
    run = finetune.prepare(config(base("llama"), pairs, tmp_path / "run"))
    last = list(run.events())[-1]
    assert held is not None and last["peak_memory"] < held - (300 << 20)
    kept = torch.ones(400 << 18)
    again = finetune.prepare(config(base("llama"), pairs, tmp_path / "again"))
    assert again.held_before >= run.held_before + (300 << 20)
    assert list(again.events())[-1]["held_before"] == again.held_before
    assert kept.numel()


def test_few_compiled_products_are_kept_unless_somebody_said_otherwise(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], "7")
    peak.begin_measuring()
    assert [os.environ[name] for name in VARIABLES] == ["7", str(KEPT)]


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


def test_freed_memory_stays_with_a_run_until_it_ends(base, pairs, tmp_path, monkeypatch):
    order, model = [], base("llama")  # which is trained, too

    class Kept:
        def __enter__(self):
            order.append("kept")

        def __exit__(self, *exception):
            order.append("given back")

    monkeypatch.setattr(run, "freed_memory_kept", Kept)
    for event in finetune.prepare(config(model, pairs, tmp_path / "run")).events():
        order.append(event["kind"])
    assert order[0] == "kept" and order.index("train") < order.index("given back")

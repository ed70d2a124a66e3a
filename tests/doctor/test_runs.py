"""Each rule about a run finds what it is for, and nothing in a run that went well."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import ardor
from ardor.doctor.rules import runs
from ardor.files.runs import checkpoints, newest_checkpoint

from .damage import Case, check, edit, look, said, template


@pytest.fixture
def run(base, tmp_path) -> Path:
    shutil.copytree(base, tmp_path / "run")
    return tmp_path / "run"


def events(*new: dict[str, Any]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        with open(run / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(event) + "\n" for event in new)

    return change


def losses(*values: float) -> Callable[[Path], None]:
    return events(
        *({"kind": "train", "step": i, "loss": v, "grad_norm": 1.0} for i, v in enumerate(values))
    )


def evaluations(*values: float, **more: Any) -> Callable[[Path], None]:
    return events(*({"kind": "eval", "step": i, "loss": v} | more for i, v in enumerate(values, 1)))


def setting(line: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        with open(run / "config.yaml", "a") as file:
            file.write(line + "\n")

    return change


def without_gradient(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [line | ({"grad_norm": 0.0} if "grad_norm" in line else {}) for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))


def in_checkpoint(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        newest = newest_checkpoint(run)
        assert newest is not None
        change(newest)

    return apply


def no_checkpoint(run: Path) -> None:
    for checkpoint in checkpoints(run):
        shutil.rmtree(checkpoint)


SPIKY = [*[3.0] * 16, 9.0, *[3.0] * 3]
CASES: dict[str, list[Case]] = {
    "run-files": [
        Case(lambda run: (run / "metrics.jsonl").unlink(), "E", ("does not exist",)),
        Case(lambda run: (run / "metrics.jsonl").write_text("{\n"), "E", ("metrics.jsonl:1",)),
        Case(no_checkpoint, "W", ("no checkpoint",)),
    ],
    "run-finite": [
        Case(losses(3.0, math.nan), "E", ("loss at step 1",)),
        Case(evaluations(math.inf), "E", ("loss at step 1",)),
    ],
    "run-spikes": [Case(losses(*SPIKY), "W", ("1 jump", "step 16: 9 after 3"))],
    "run-heldout": [
        Case(evaluations(2.0, 1.5, 1.8), "W", ("by heart", "1.5 at step 2")),
        Case(evaluations(2.0, stop_rate=0.5), "W", ("50% of the answers",)),
    ],
    "run-moved": [Case(without_gradient, "E", ("every gradient of the run is zero",))],
    "run-model": [
        Case(in_checkpoint(template("{{ messages }}<|im_end|>")), "I", ("no template",)),
        Case(
            in_checkpoint(lambda newest: edit("tokenizer.json", pre_tokenizer=None)(newest)),
            "E",
            ("the same text is other ids",),
        ),
    ],
    "run-exceptions": [Case(setting("allow: [template-end]"), "I", ("template-end",))],
}
WELL = {
    "run-files": events({"kind": "memory", "step": 3}),
    "run-finite": losses(3.0, 1e30),
    "run-spikes": losses(*[3.0] * 16, 3.9, *[3.0] * 3),
    "run-heldout": evaluations(2.0, 1.5, 1.6, stop_rate=0.95),
    "run-moved": losses(3.0, 3.0),
    "run-model": in_checkpoint(edit("tokenizer_config.json", model_max_length=48)),
    "run-exceptions": setting("allow: []"),
}


@pytest.mark.parametrize(("rule", "case"), [(r, c) for r, cases in CASES.items() for c in cases])
def test_a_rule_finds_what_it_is_for(model, run, rule, case):
    case.change(run)
    check(look(model, run=run), rule, case)


@pytest.mark.parametrize("rule", WELL)
def test_a_rule_leaves_what_only_looks_alike(model, run, rule):
    WELL[rule](run)
    assert not said(look(model, run=run), rule)


def test_every_rule_has_both():
    assert {*CASES} == {*WELL} == {*runs.RULES}


def test_what_full_training_has_not_moved_is_named(model, run):
    """A run of the model that ends with the model, but for one matrix."""
    newest = newest_checkpoint(run)
    assert newest is not None
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("model: null", f"model: {model}"))
    held = load_file(newest / "model.safetensors")
    names = [name for name, tensor in held.items() if tensor.ndim > 1]
    ((level, text),) = said(look(model, run=run), "run-moved")
    assert level == "W" and f"{len(names)} matrices" in text
    moved = {name: held[name] + (name in names) for name in held}
    save_file(moved, newest / "model.safetensors")
    assert not said(look(model, run=run), "run-moved")


def test_the_folder_of_a_run_is_looked_at_without_being_asked(run):
    losses(math.nan)(run)
    assert said(ardor.doctor(run, probe=False), "run-finite")


def test_a_run_that_is_no_folder_is_refused(model, tmp_path):
    with pytest.raises(ardor.ConfigError, match="is no folder"):
        look(model, run=tmp_path / "nowhere")

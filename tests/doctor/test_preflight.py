"""What is looked at by itself before training: errors stop it, unless they are set aside."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import ardor
from ardor.cli.main import main
from ardor.data.sources import read_rows
from ardor.doctor.preflight import ROWS, check_rules, preflight
from ardor.train import finetune
from ardor.train.config import Finetune
from ardor.vocabulary import set_pad

from ..test_vocabulary import made
from ..tiny import write_rows
from .cases_text import BETWEEN, ENDS_TEXT
from .damage import EMBED, template, together, value, weights
from .test_data import GOOD, chats, ids, pairs

DEAD = value(EMBED, slice(278, 280), 0.0)  # the control tokens' rows


def config(model: Path, data: Path, **settings: Any) -> Finetune:
    given = {"output": data.parent / "run", "max_steps": 1, "dtype": "float32", "lora_r": 2}
    return Finetune(model=str(model), data=str(data), **(given | settings))


@pytest.fixture
def data(chat) -> Path:
    return write_rows(chat.parent / "rows.jsonl", GOOD)


def test_an_error_stops_before_anything_is_loaded_or_written(chat, data, monkeypatch):
    DEAD(chat)
    monkeypatch.setattr(finetune, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    with pytest.raises(ardor.ConfigError, match="never trained on") as caught:
        finetune.prepare(config(chat, data))
    assert "--allow untrained-tokens" in str(caught.value)
    assert not (data.parent / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"allow": ("untrained-tokens",)},
        {"train_control_tokens": "yes"},
        {"method": "full", "lora_r": 16},
    ],
)
def test_it_goes_on_where_the_rule_is_set_aside_or_the_rows_are_trained(chat, data, settings):
    DEAD(chat)
    run = finetune.prepare(config(chat, data, **settings))
    assert any("never trained on" in note for note in run.notes)
    assert any("set aside by allow=" in note for note in run.notes) is ("allow" in settings)
    held = yaml.safe_load((data.parent / "run" / "config.yaml").read_text())
    assert held["allow"] == list(settings.get("allow", ()))


def test_a_template_that_is_new_to_the_model_has_its_rows_trained(model, tmp_path):
    """No error: what is looked at is the template that will be used, not the model's."""
    DEAD(model)
    data = write_rows(tmp_path / "rows.jsonl", GOOD)
    run = finetune.prepare(config(model, data))
    assert any("they are trained now" in note for note in run.notes)
    with pytest.raises(ardor.ConfigError, match="never trained on"):
        finetune.prepare(config(model, data, train_control_tokens="no", output=tmp_path / "r2"))


def test_warnings_are_notes_and_say_which_rule(chat, data):
    template(BETWEEN)(chat)
    run = finetune.prepare(config(chat, data))
    assert any("(template-end)" in note for note in run.notes)


def test_what_is_said_of_a_row_is_its_own_error(chat):
    data = write_rows(chat.parent / "rows.jsonl", [*GOOD, {"messages": "x"}])
    with pytest.raises(ardor.DataError, match="rows.jsonl:13 .* expected a list of messages"):
        finetune.prepare(config(chat, data))


def test_rows_are_held_against_the_held_out_ones(chat, data):
    held = write_rows(chat.parent / "held.jsonl", GOOD[:1])
    run = finetune.prepare(config(chat, data, eval_data=str(held)))
    assert any("(held-out-leak)" in note for note in run.notes)


def test_the_first_rows_are_looked_at(chat):
    rows = [*read_rows([*chats(ROWS), *chats(1)])]
    assert not [f for f in preflight(chat, rows=rows) if f.rule == "duplicates"]
    rows = [*read_rows([*chats(1), *chats(20)])]
    assert [f for f in preflight(chat, rows=rows) if f.rule == "duplicates"]


def test_a_name_that_is_no_rule_gets_the_nearest(chat, data):
    with pytest.raises(ardor.ConfigError, match="did you mean template-end?"):
        finetune.prepare(config(chat, data, allow=("template_end",)))
    check_rules(("template-end",))


def test_a_model_to_serve_is_looked_at_the_same_way(chat):
    assert preflight(chat) == ()
    ENDS_TEXT(chat)
    assert [(f.rule, f.level) for f in preflight(chat)] == [("stop-token", "W")]
    together(DEAD)(chat)
    with pytest.raises(ardor.ConfigError, match="<.im_start.> .278.: a row of almost zeros"):
        preflight(chat)
    assert [f.level for f in preflight(chat, allow=["untrained-tokens"])] == ["E", "W"]


def test_of_a_run_the_checkpoint_that_is_loaded_is_looked_at(chat, tmp_path):
    """The best where the run ended with it, not the newest."""
    run = tmp_path / "run"
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(chat, run / name)
    DEAD(run / "checkpoint-1")
    assert preflight(run) == ()
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-1"}))
    with pytest.raises(ardor.ConfigError, match="a row of almost zeros"):
        preflight(run)


def test_what_the_loader_refuses_is_left_to_its_own_message(chat, data):
    weights(lambda held: held.pop("model.norm.weight"))(chat)
    with pytest.raises(ardor.CheckpointError, match=r"model\.norm\.weight"):
        finetune.prepare(config(chat, data))


def test_a_resumed_run_is_not_looked_at_again(chat, data):
    DEAD(chat)
    settings = {"allow": ("untrained-tokens",), "max_steps": 1}
    list(finetune.prepare(config(chat, data, **settings)).events())
    run = finetune.prepare(config(chat, data, resume=True, max_steps=1))
    assert run.resumed and not any("doctor" in note for note in run.notes)


def test_from_the_command_line(chat, data, capsys):
    DEAD(chat)
    command = ["finetune", str(chat), str(data), "-o", str(data.parent / "run"), "--max-steps", "1"]
    assert main(command) == 2
    assert "error: 2 control tokens of the chat" in capsys.readouterr().err
    assert main([*command, "--allow", "untrained-tokens", "--allow", "template-end"]) == 0
    assert "set aside by allow=untrained-tokens" in capsys.readouterr().err


def test_rows_that_other_software_encoded_are_no_format_of_training(chat):
    """Doctor judges them; training does not read them, and says so."""
    with pytest.raises(ardor.DataError, match="input_ids"):
        finetune.prepare(config(chat, write_rows(chat.parent / "rows.jsonl", ids([5, 276]))))


def test_completions_need_no_template(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", pairs(("the", " cat"), ("a", " mat")))
    run = finetune.prepare(config(model, data))
    assert not any("doctor" in note for note in run.notes)


# What a run makes of tokens and template is judged, not what the files had before.


def test_tokens_that_a_run_adds_are_judged_as_trained_and_nothing_is_loaded(tmp_path, monkeypatch):
    base, data = made(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", GOOD)
    seen = []

    def looked(*given: Any, **named: Any) -> Any:
        seen.append(preflight(*given, **named))
        return seen[-1]

    monkeypatch.setattr(finetune, "preflight", looked)
    monkeypatch.setattr(finetune, "load_model", lambda *a, **k: pytest.fail("went on to load"))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(pytest.fail.Exception, match="went on to load"):
        finetune.prepare(config(base, data, setup_chat_format=True, add_tokens=("<tool>",)))
    assert not [f for f in seen[0] if f.level == "E"]
    # The rule sees ChatML, so it knows the end that files of the base do not name.
    assert "stop-token" not in [f.rule for f in seen[0]]
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ardor.ConfigError, match="pad_strategy=unk, but .* has no UNK token"):
        finetune.prepare(config(base, data, setup_chat_format=True, pad_strategy="unk"))


def test_a_template_that_a_run_takes_from_another_model_is_the_one_judged(chat, tmp_path):
    template(BETWEEN)(chat)
    base, data = made(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", GOOD)
    run = finetune.prepare(config(base, data, clone_chat_template=str(chat)))
    assert any("(template-end)" in note for note in run.notes)
    run = finetune.prepare(config(base, data, setup_chat_format=True, output=tmp_path / "r2"))
    assert not any("(template-end)" in note for note in run.notes)


def test_a_reserved_row_that_a_run_makes_anew_is_no_untrained_one(tmp_path):
    """Rows of zeros behind the vocabulary, as resized checkpoints have them."""
    base, data = made(tmp_path / "m", rows=320), write_rows(tmp_path / "rows.jsonl", GOOD)
    value(EMBED, slice(290, 320), 0.0)(base)
    run = finetune.prepare(config(base, data, setup_chat_format=True))
    assert not any("never trained on" in note for note in run.notes)


# --- the padding token ---

HELD = {
    "own": {"pad_token": "<own>", "reserve": "<|reserved_special_token_0|>"},
    "unk": {"unk_token": "<unk>"},
    "both": {"pad_token": "<unk>", "unk_token": "<unk>"},
    "reserve": {"reserve": "<|finetune_right_pad_id|>", "reserve2": "<|dummy_1|>"},
    "nothing": {"reserve": "<|dummy_1|>"},
}


@pytest.mark.parametrize("strategy", ["auto", "unk", "eos", "new"])
@pytest.mark.parametrize("case", HELD)
def test_the_padding_token_is_chosen_beside_the_data_and_as_the_run_does(
    tmp_path, monkeypatch, case, strategy
):
    """Control tokens count in segments, and so they can hold any of them."""
    names = HELD[case]
    word = "mat" if case == "nothing" else next(iter(names.values()))
    rows = [
        {"segments": [{"label": False, "text": "the cat"}, {"label": True, "text": text}]}
        for text in ("sat on the mat", f"sat on {word} the<|endoftext|>")
    ]
    base, data = made(tmp_path / "m", **names), write_rows(tmp_path / "d.jsonl", rows)
    chosen: dict[str, list[int]] = {}
    for name in ("ardor.doctor.preflight", "ardor.train.finetune"):

        def noted(model, strategy, *, occurs, name=name):
            said = set_pad(model, strategy, occurs=occurs)
            chosen.setdefault(name, []).append(model.tokenizer.special.pad)
            return said

        monkeypatch.setattr(import_module(name), "set_pad", noted)
    if strategy == "unk":
        with pytest.raises(ardor.ConfigError, match="pad_strategy=unk, but .*(no UNK|hold it)"):
            finetune.prepare(config(base, data, pad_strategy="unk"))
        assert not chosen and not (tmp_path / "run").exists()  # before anything is loaded
        return
    run = finetune.prepare(config(base, data, pad_strategy=strategy, lora_r=2))
    (before,), (after,) = chosen.values()
    assert before == after == run.model.tokenizer.special.pad
    (note,) = [note for note in run.notes if note.startswith("padding token")]
    named = f"not {word!r}, which the data hold: {data}, row 2" in note
    assert named is (strategy == "auto" and case != "nothing")
    assert not [note for note in run.notes if "pad-in-data" in note]
    held = {*run.train.tokens.tolist()}
    assert (after in held) is (after in run.model.stops.ids)

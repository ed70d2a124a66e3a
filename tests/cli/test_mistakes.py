"""What a person gets wrong on a command line: one message that says what, and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import TRAIN, TUNE, newest


def test_missing_files_are_named(world, refused, tmp_path):
    near = tmp_path / "pairs.jsonl"
    near.write_text("{}\n")
    message = refused("finetune", world.base, tmp_path / "pair.jsonl", *TUNE)
    assert (
        message == f"{tmp_path / 'pair.jsonl'} does not exist; nearest in {tmp_path}: pairs.jsonl"
    )
    assert "is not a directory" in refused("generate", tmp_path / "none", "x")
    assert "no such file" in refused("train", world.texts, "--config", tmp_path / "none.yaml")
    message = refused("finetune", world.base, world.pairs, *TUNE, "--chat-template", "none.jinja")
    assert "neither a file that exists nor a template's name; known are headings" in message
    assert "does not exist" in refused("train", world.texts, *TRAIN, "--eval-data", "./none.txt")


def test_an_unknown_flag_and_an_unknown_key_name_the_nearest(world, refused, tmp_path):
    message = refused("finetune", world.base, world.pairs, "--learning-rat", 1)
    assert message.startswith("unknown flag --learning-rat; did you mean --learning-rate?")
    settings = tmp_path / "run.yaml"
    settings.write_text("learning_rate: 0.1\nlora_alfa: 3\n")
    message = refused("finetune", world.base, world.pairs, "--config", settings)
    assert message.startswith(
        f"{settings}, line 2: unknown key 'lora_alfa'; did you mean 'lora_alpha'?"
    )
    assert "missing DATA" in refused("finetune", world.base)
    assert "logging_steps=0" in refused("train", world.texts, "--logging-steps", 0)
    message = refused("train", world.texts, "--max-steps", "1.5")
    assert "found '1.5', expected a whole number" in message
    message = refused("train", world.texts, "--hidden-size", 15, "--num-attention-heads", 4)
    assert message.startswith(
        "a small llama with --hidden-size, --num-attention-heads: "
        "hidden_size=15 is not a multiple of num_attention_heads=4"
    )


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("", "data.jsonl holds no rows; give a dataset with at least one"),
        (
            '{"prompt": "a", "completion": "b"}\n\n{"quest": "a", "reply": "b"}\n',
            "data.jsonl:3 is in no known format: found the columns quest, reply",
        ),
        (
            '{"messages": [{"role": "user", "content": "hi"}]}\n',
            "nothing is trained on: none of the 1 rows holds an answer",
        ),
        ('{"prompt": "a", "completion": " "}\n', "nothing is trained on"),
        ('{"prompt": "a", "completion"\n', "data.jsonl:1: not valid JSON at column"),
        ('["a"]\n', "data.jsonl:1: found list, expected an object with named columns"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"rol": "assistant"}]}\n',
            "data.jsonl:1 (messages): ",
        ),
    ],
)
def test_data_that_cannot_be_learnt_is_named_with_its_line(world, refused, tmp_path, rows, says):
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    message = refused("finetune", world.base, data, "-o", tmp_path / "run", *TUNE)
    assert says in message
    assert not (tmp_path / "run").exists()


def test_training_from_scratch_needs_text(world, refused, tmp_path):
    message = refused("train", world.pairs, "-o", tmp_path / "run", *TRAIN)
    assert f"{world.pairs}:1 has no text (found prompt, completion)" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken(world, tmp_path) -> Path:
    """A copy of the base model to damage."""
    shutil.copytree(newest(world.base), tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_and_an_extra_tensor_are_named(broken, refused):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    assert f"missing {name}; the weights do not belong" in refused("generate", broken, "x")
    save_file(tensors | {"model.layers.0.extra": torch.zeros(1)}, file)
    assert "unexpected model.layers.0.extra" in refused("generate", broken, "x")
    save_file(tensors | {name: torch.zeros(3, 3)}, file)
    assert f"{name} gives layers.0.ffn.up_proj.weight the shape [3, 3]" in refused(
        "score", broken, "x y", "--text"
    )


def test_damaged_files_are_named(broken, world, refused, tmp_path):
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    assert f"{file} is damaged or was cut short (200 bytes)" in refused("generate", broken, "x")
    message = refused("finetune", broken, world.pairs, "-o", tmp_path / "run", *TUNE)
    assert "damaged" in message and not (tmp_path / "run").exists()
    file.write_bytes(whole)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 24'))
    assert "config.json" in refused("generate", broken, "x")
    (broken / "config.json").write_text(config[:50])
    assert "is not valid JSON" in refused("generate", broken, "x")
    (broken / "config.json").write_text(config.replace("{", '{"sliding_window_x": 4,', 1))
    assert "nothing reads sliding_window_x=4" in refused("generate", broken, "x")
    (broken / "config.json").write_text(config)
    (broken / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused("generate", broken, "x")


def test_a_user_s_mistake_in_json_is_an_object(world, say, tmp_path):
    said = say("finetune", world.base, tmp_path / "none.jsonl", "--json")
    assert said.code == 2 and said.out == ""
    assert json.loads(said.err)["error"] == "DataError"

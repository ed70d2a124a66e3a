"""`ardor merge`, and adapters of runs through the public surface."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import ardor
from ardor.cli.main import main
from ardor.files.runs import newest_checkpoint
from ardor.train import finetune
from ardor.train.config import Finetune

TOKENS = [[5, 9, 3, 17, 8, 2]]


def merged(world, out, *flags, run=None):
    return main(["merge", str(run or world.qlora), "-o", str(out), "--json", *flags])


def test_a_lora_run_merged_computes_what_it_did(world, tmp_path, capsys):
    assert merged(world, tmp_path / "m", run=world.lora) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onto"] == "16bit" and report["trained_on"] is None
    assert report["logits"]["largest"] < 1e-4 and report["logits"]["same_choice"] == 1
    one, two = ardor.load(world.lora), ardor.load(tmp_path / "m")
    assert two.model.adapter is None
    torch.testing.assert_close(one.logits(TOKENS), two.logits(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("onto", ["16bit", "dequantized", "requantized"])
def test_a_qlora_run_is_merged_onto_what_is_asked(world, tmp_path, capsys, onto):
    assert merged(world, tmp_path / "m", "--onto", onto) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onto"] == onto and report["trained_on"] == "nf4"
    assert len(report["residuals"]) == 14
    for one in report["residuals"]:
        assert one["requantized"] > 10 * one["rounding"]  # packing again is what costs
        assert (one["base"] is not None) == (onto == "16bit")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config.get("quantization_config") is not None) == (onto == "requantized")
    trained, found = ardor.load(world.qlora), ardor.load(tmp_path / "m")
    difference = float((trained.logits(TOKENS) - found.logits(TOKENS)).abs().max())
    assert difference < {"dequantized": 0.01, "16bit": 0.1, "requantized": 0.5}[onto]


def test_people_are_told_what_is_lost(world, tmp_path, capsys):
    assert main(["merge", str(world.qlora), "-o", str(tmp_path / "m")]) == 0
    text = capsys.readouterr().out
    for words in ("merged onto   16bit", "rounding", "base ", "requantized", "logit check"):
        assert words in text


def test_what_cannot_be_merged_is_said(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, words in (
        ([str(world.base), "-o", "x"], "has no adapter to merge; give the folder of a LoRA"),
        ([str(world.lora), "-o", "x", "--onto", "requantized"], "was trained on full weights"),
        ([str(world.lora)], "missing OUTPUT"),
        ([str(world.lora), "-o", "x", "--onto", "8bit"], "onto"),
    ):
        assert main(["merge", *args]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def run_with(world, output, **settings):
    config = Finetune(
        model=str(world.base),
        data=str(world.pairs),
        output=output,
        chat_template="chatml",
        max_steps=settings.pop("max_steps", 4),
        save_steps=2,
        learning_rate=1e-2,
        lora_r=2,
        dtype="float32",
        **settings,
    )
    run = finetune.prepare(config)
    list(run.events())
    return run


def test_a_loftq_adapter_is_merged_onto_what_it_was_trained_on(world, tmp_path, capsys):
    settings = {"method": "qlora", "init_lora_weights": "loftq", "lora_alpha": 8.0}
    run_with(world, tmp_path / "run", **settings)
    assert merged(world, tmp_path / "m", run=tmp_path / "run") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onto"] == "dequantized" and "makes up for" in report["why"]
    assert report["logits"]["largest"] < 0.01
    assert merged(world, tmp_path / "m2", "--onto", "16bit", run=tmp_path / "run") == 2
    assert "use --onto dequantized" in capsys.readouterr().err


BEGINNINGS = {
    "pissa": {"init_lora_weights": "pissa"},
    "eva-dora": {"init_lora_weights": "eva", "use_dora": True},
    "loftq": {"method": "qlora", "init_lora_weights": "loftq"},
    "saved": {"modules_to_save": ("embed_tokens",), "lora_dropout": 0.1},
}


@pytest.mark.parametrize("settings", BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_resumed_run_of_any_beginning_is_the_uninterrupted_one_bitwise(world, tmp_path, settings):
    for name in ("whole", "cut"):
        run_with(world, tmp_path / name, **settings)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")  # as if killed after step 2
    run_with(world, tmp_path / "cut", **settings, resume=True)
    ends = [newest_checkpoint(tmp_path / name) for name in ("whole", "cut")]
    one, two = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_tells_of_its_preparation(world, tmp_path):
    run = run_with(world, tmp_path / "run", method="qlora", max_steps=1)
    for words in ("k-bit before: ", "k-bit after: ", "no cache is kept"):
        assert any(words in note for note in run.notes)


def test_adapters_are_switched_for_each_request(world):
    lm = ardor.load(world.lora)
    base = ardor.load(world.base)
    alone = lm.logits(TOKENS)
    lm.load_adapter(world.lora, "again")
    assert [*lm.adapters] == ["default", "again"]
    assert torch.equal(lm.logits(TOKENS), alone)
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    first = lm.generate("the cat", **settings)
    mixed = lm.generate(["the cat"] * 3, adapter=["again", None, "default"], **settings)
    plain = base.generate("the cat", **settings)
    assert [one.text for one in mixed] == [first.text, plain.text, first.text]
    for wrong, words in (
        (["again"], "found 1 adapters for 3 prompts"),
        (["b"] * 3, "no adapter 'b'"),
    ):
        with pytest.raises(ardor.ConfigError, match=words):
            lm.generate(["the cat"] * 3, adapter=wrong, **settings)
    pieces = [*lm.stream("the cat", adapter=None, **settings)]
    assert "".join(piece.text for piece in pieces) == plain.text
    lm.merge()
    torch.testing.assert_close(lm.logits(TOKENS), alone, rtol=1e-4, atol=1e-4)
    lm.unmerge()
    assert torch.equal(lm.logits(TOKENS), alone)
    lm.use_adapter(None)
    assert torch.equal(lm.logits(TOKENS), base.logits(TOKENS))
    with pytest.raises(ardor.ConfigError, match=r"of A and B \(rows of single tokens\)"):
        lm.combine_adapters("both", {"default": 0.5, "again": 0.5})  # they train token rows too

"""What `ardor train` and `ardor finetune` do with data of several kinds, from the command line."""

import json
from pathlib import Path

import pytest

from ardor.cli.main import main

SIZES = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
TRAIN = f"{SIZES} --num-attention-heads 2 --max-length 48 --dtype float32 --save-steps 2".split()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def ardor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ARDOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ardor.data.cache.SMALL", 0)

    def run(*args):
        code = main([str(arg) for arg in args])
        return code, capsys.readouterr().err.replace("\n", " ")

    return run


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_mixture_of_yaml_is_cached_and_taken_up_again_bitwise(ardor, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": f"the cat {i} sat"} for i in range(30)])
    b = write(tmp_path / "b.jsonl", [{"text": f"a dog {i} ran"} for i in range(6)])
    settings = tmp_path / "c.yaml"
    settings.write_text(f"data:\n- {{path: {a}, weight: 3}}\n- {{path: {b}, weight: 1}}\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = ardor("train", "--config", settings, *TRAIN, "-o", whole, "--max-steps", 4)
    assert code == 0 and "mixture: an epoch has" in said and "tokens: kept in" in said
    code, said = ardor(
        "train", f"{a},weight=3", f"{b},weight=1", *TRAIN, "-o", parts, "--max-steps", 4
    )
    assert code == 0 and "tokens: as encoded before" in said
    assert losses(whole) == losses(parts)
    kept = losses(parts)
    for newest in parts.glob("checkpoint-4"):  # as if it had been killed after the second step
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    resume = ("train", *TRAIN, "-o", parts, "--max-steps", 4, "--resume", "--data")
    code, said = ardor(*resume, f"{a},weight=1", f"{b},weight=3")
    assert code == 2 and "was trained on other data" in said
    code, said = ardor(*resume, f"{a},weight=3", f"{b},weight=1", "--no-cache")
    assert code == 0 and "tokens:" not in said
    assert losses(parts) == kept


def test_mistakes_about_datasets_are_told(ardor, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "the cat"}])
    bad = write(tmp_path / "bad.jsonl", [{"chosen": "a", "rejected": "b"}])
    for args, message in (
        ([f"{a},wieght=2"], "'wieght' is unknown; did you mean weight?"),
        ([f"{a},weight=2", a], "has no weight, but other data have"),
        ([f"{a},weight=none"], "expected a number above 0"),
        ([a, tmp_path / "b.jsonl"], "b.jsonl does not exist"),
        ([bad], "bad.jsonl:1 has no text (found chosen, rejected)"),
    ):
        code, said = ardor("train", *args, *TRAIN, "-o", tmp_path / "x")
        assert code == 2 and message in said, said
    settings = tmp_path / "c.yaml"
    settings.write_text(f"data: [{{path: {a}, wait: 2}}]\n")
    code, said = ardor("train", "--config", settings, *TRAIN)
    assert code == 2 and "found path, wait; expected a path" in said

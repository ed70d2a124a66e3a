"""Tokens on the disk: the same as those in memory, and never those of something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ardor.data import cache
from ardor.data.cache import ABOUT, cache_folder, encode
from ardor.data.dataset import Dataset
from ardor.data.mixture import Mixture
from ardor.errors import CheckpointError, DataError
from ardor.text.chat import CHATML, ChatTemplate
from ardor.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat {i} sat"}) + "\n" for i in range(20)))
    return path


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_second_time_nothing_is_encoded(data, tokenizer, folder, monkeypatch):
    first = encode(Mixture([str(data)]), tokenizer, max_length=4)
    expected = Dataset.build(Mixture([str(data)]), tokenizer, max_length=4)
    assert first.dataset == expected and first.dataset.census == expected.census
    assert first.note == f"tokens: kept in {folder / entries(folder)[0]}"
    monkeypatch.setattr(Dataset, "build", lambda *_, **__: pytest.fail("encoded again"))
    again = encode(Mixture([str(data)]), tokenizer, max_length=4)
    assert again.dataset == expected and again.dataset.census == expected.census
    assert "as encoded before" in (again.note or "")
    assert again.dataset.fingerprint == Dataset.fingerprint.func(again.dataset)
    assert not again.dataset.tokens.flags.writeable


def test_whatever_matters_makes_another_entry(data, tokenizer, folder, tmp_path, monkeypatch):
    def count(data=data, tokenizer=tokenizer, template=None, **options):
        encode(Mixture([str(data)]), tokenizer, template, **options)
        return len(entries(folder))

    assert count() == count() == 1
    moved = tmp_path / "deeper" / "a.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(data.read_bytes())
    assert count(moved) == 1  # it is the content that counts
    assert count(max_length=5) == 2
    assert count(max_length=5, over_length="truncate_left") == 3
    assert count(max_length=5, over_length="truncate") == 3  # the same by its older name
    assert count(template=CHATML) == 4
    assert count(template=ChatTemplate(CHATML.source + " ")) == 5
    assert count(vocab=10_000) == 6
    assert count(tokenizer=Tokenizer.train(["the cat"], vocab_size=280)) == 7
    data.write_text(data.read_text().replace("sat", "mat"))  # as long as it was
    assert count() == 8
    monkeypatch.setattr(cache, "_code", lambda: "another")
    assert count() == 9


def test_the_hash_of_the_code_follows_the_code(tmp_path, monkeypatch):
    for name in ("data/a.py", "text/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "data" / "a.py"))
    before = cache._code()
    (tmp_path / "text/b.py").write_text("x = 2\n")
    assert cache._code() != before


@pytest.mark.parametrize("name", ["tokens.i4", "lengths.i8", ABOUT])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_made_again(data, tokenizer, folder, name, damage):
    whole = encode(Mixture([str(data)]), tokenizer).dataset
    fingerprint = whole.fingerprint
    path = folder / entries(folder)[0] / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:-4] if damage == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
    again = encode(Mixture([str(data)]), tokenizer)
    assert "kept in" in (again.note or "") and again.dataset.fingerprint == fingerprint
    assert path.read_bytes() == raw


def test_nothing_is_left_of_data_that_cannot_be_read(data, tokenizer, folder):
    data.write_text('{"text": "the cat"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 \(text\)"):
        encode(Mixture([str(data)]), tokenizer)
    assert entries(folder) == []


def test_without_a_cache_nothing_is_written(data, tokenizer, folder, monkeypatch):
    assert encode(Mixture([str(data)]), tokenizer, cache=False).note is None
    monkeypatch.setattr(cache, "SMALL", 1 << 20)
    assert encode(Mixture([str(data)]), tokenizer).note is None
    assert entries(folder) == []


def test_a_folder_that_cannot_be_written_is_done_without(data, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARDOR_CACHE", str(tmp_path / "file"))
    found = encode(Mixture([str(data)]), tokenizer)
    assert "tokens are in memory" in (found.note or "") and len(found.dataset) == 20


def test_another_process_may_win(data, tokenizer, folder, monkeypatch):
    expected = encode(Mixture([str(data)]), tokenizer).dataset
    place, read, calls = folder / entries(folder)[0], cache._read, []

    def late(where):  # it is not there when asked first, and there when we are done
        calls.append(where)
        return read(where) if len(calls) > 1 else None

    def lose(*_):
        raise CheckpointError("cannot write")

    monkeypatch.setattr(cache, "_read", late)
    monkeypatch.setattr(cache, "_describe", lose)
    assert encode(Mixture([str(data)]), tokenizer).dataset == expected and calls == [place] * 2


def test_two_processes_at_once_make_one_entry(data, tokenizer, folder, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    script = (
        "import sys; from ardor.data import cache; cache.SMALL = 0\n"
        "from ardor.data.mixture import Mixture\n"
        "from ardor.text.tokenizer import Tokenizer\n"
        "found = Tokenizer.from_directory(sys.argv[2])\n"
        "print(cache.encode(Mixture(sys.argv[1]), found).dataset.fingerprint)"
    )
    command = [sys.executable, "-c", script, str(data), str(tmp_path / "tokenizer")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in running}
    assert said == {Dataset.build(Mixture([str(data)]), tokenizer).fingerprint}
    assert len(entries(folder)) == 1


def test_a_stream_leaves_no_files(tokenizer, folder, monkeypatch, data):
    rows = Mixture([str(data)])
    monkeypatch.setattr(Mixture, "bytes", None)
    monkeypatch.setattr(Mixture, "identity", lambda _: None)
    found = encode(rows, tokenizer)
    assert entries(folder) == [] and found.dataset[3].tokens  # mapped all the same
    assert found.dataset == Dataset.build(rows, tokenizer)


def test_the_folder_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("ARDOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ardor" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ardor" / "tokens"

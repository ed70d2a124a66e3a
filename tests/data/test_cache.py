"""Tokens on the disk: the same as those in memory, and never those of something else."""

import errno
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ardor.data import cache
from ardor.data.batches import BatchPlan
from ardor.data.cache import ABOUT, cache_folder, encode, encode_judged
from ardor.data.dataset import Dataset
from ardor.data.mixture import Mixture
from ardor.data.preferences import Judged, build_judged
from ardor.data.store import FileStore
from ardor.errors import CheckpointError, ConfigError, DataError
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
    kept = f"tokens: kept in {folder / entries(folder)[0]}; 1 such, 0 MiB of at most 50.0 GiB"
    assert first.note == f"{kept} (ARDOR_CACHE_SIZE)"
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


def pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"the cat {i}", "chosen": f" sat {i}", "rejected": " on" * (i % 3 + 1)}
        for i in range(count)
    ]


@pytest.fixture
def judgements(tmp_path):
    rows = [*pairs(20), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_judged_answers_are_encoded_once_and_the_same(
    judgements, tokenizer, folder, monkeypatch, kind
):
    options = {"max_length": 9, "over_length": "truncate_right"}
    expected = build_judged(Mixture([str(judgements)]), tokenizer, None, kind, **options)
    seen: list[int] = []
    first = encode_judged(
        Mixture([str(judgements)]), tokenizer, None, kind, progress=seen.append, **options
    )
    assert seen == list(range(1, 22)) and "kept in" in (first.note or "")
    monkeypatch.setattr(cache, "build_judged", lambda *_, **__: pytest.fail("encoded again"))
    again = encode_judged(Mixture([str(judgements)]), tokenizer, None, kind, **options)
    assert "as encoded before" in (again.note or "")
    assert {path.name for path in (folder / entries(folder)[0]).iterdir()} == {
        *(f"{name}.{dtype[1:]}" for name, dtype in Judged.dtypes.items()),
        ABOUT,  # and nothing of the answers before they had their second document
    }
    assert expected.census.alike == 1 and expected.census.unended > 0
    for found in (first.dataset, again.dataset):
        assert isinstance(found, Judged) and found.census == expected.census
        assert found.fingerprint == expected.fingerprint == replace(found).fingerprint
        for name in ("tokens", "supervised", "starts", "rows", "unended", "firsts", "liked"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype and (ours == theirs).all(), name
        assert not found.tokens.flags.writeable
        plans = [BatchPlan(one, tokens_per_batch=64, seed=3) for one in (found, expected)]
        assert plans[0].fingerprint == plans[1].fingerprint
        assert [*plans[0].epoch(1)] == [*plans[1].epoch(1)]


def test_judged_answers_have_entries_of_their_own(judgements, tokenizer, folder):
    rows = Mixture([str(judgements)])
    encode(rows, tokenizer, max_length=9, preferences="chosen")
    encode_judged(rows, tokenizer, None, "pairs", max_length=9)
    encode_judged(rows, tokenizer, None, "labels", max_length=9)
    encode_judged(rows, tokenizer, CHATML, "labels", max_length=9)
    encode_judged(rows, tokenizer, CHATML, "labels", max_length=9, over_length="drop")
    assert len(entries(folder)) == 5
    found = encode_judged(rows, tokenizer, None, "pairs", max_length=9)
    assert "as encoded before" in (found.note or "") and len(entries(folder)) == 5


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_judged_answers_that_cannot_be_read_leave_nothing(judgements, tokenizer, folder, kind):
    with judgements.open("a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:22: found the columns prompt, chosen"):
        encode_judged(Mixture([str(judgements)]), tokenizer, None, kind, max_length=9)
    assert entries(folder) == []


# --- how much is kept ---


def used(folder: Path, order: list[str]) -> None:
    """Let the entries have been used in this order, long ago."""
    for i, name in enumerate(order):
        os.utime(folder / name / ABOUT, (i, i))


def entry_of(note: str | None) -> str:
    return (note or "").split(";")[0].rpartition("/")[2]


def three(data: Path, tokenizer: Tokenizer) -> list[str]:
    """Entries of the same data, which nobody uses any more."""
    found = [
        entry_of(encode(Mixture([str(data)]), tokenizer, max_length=limit).note)
        for limit in (4, 5, 6)
    ]
    gc.collect()
    return found


def sizes(folder: Path) -> int:
    return sum(file.stat().st_size for place in folder.iterdir() for file in place.iterdir())


def test_what_was_not_used_for_longest_makes_way(data, tokenizer, folder, monkeypatch):
    a, b, c = three(data, tokenizer)
    used(folder, [a, b, c])
    monkeypatch.setenv("ARDOR_CACHE_SIZE", str(sizes(folder)))
    encode(Mixture([str(data)]), tokenizer, max_length=4)  # so that `a` is the latest
    assert entries(folder) == sorted([a, b, c])
    found = encode(Mixture([str(data)]), tokenizer, max_length=40)
    assert entries(folder) == sorted([a, c, entry_of(found.note)])
    assert "3 such, 0 MiB of at most 0 MiB (ARDOR_CACHE_SIZE); 1 that was not" in (found.note or "")


def test_what_is_mapped_stays_until_nothing_maps_it(data, tokenizer, folder, monkeypatch):
    a, b, c = three(data, tokenizer)
    mapped = encode(Mixture([str(data)]), tokenizer, max_length=4).dataset
    part, whole = mapped.split(0.5)[0], mapped[0]
    del mapped
    gc.collect()
    used(folder, [a, b, c])
    monkeypatch.setenv("ARDOR_CACHE_SIZE", "1")
    found = encode(Mixture([str(data)]), tokenizer, max_length=40)
    mine = entry_of(found.note)
    assert entries(folder) == sorted([a, mine])  # both over the limit, and in use
    assert "2 that were not used for longest made way; the rest is in use" in (found.note or "")
    assert part.tokens[0] == whole.tokens[0]
    del part, found
    gc.collect()
    encode(Mixture([str(data)]), tokenizer, max_length=50)
    assert len(entries(folder)) == 1 and not {a, mine} & {*entries(folder)}


def elsewhere(data: Path, tokenizer: Tokenizer, folder: Path, then: str) -> list[str]:
    """A command that does something with the cache in another process."""
    tokenizer.save(folder / "tokenizer")
    script = (
        "import sys; from ardor.data import cache; cache.SMALL = 0\n"
        "from ardor.data.mixture import Mixture\n"
        "from ardor.text.tokenizer import Tokenizer\n"
        "found = Tokenizer.from_directory(sys.argv[2])\n"
    )
    return [sys.executable, "-c", script + then, str(data), str(folder / "tokenizer")]


def test_what_another_process_maps_stays(data, tokenizer, folder, tmp_path, monkeypatch):
    then = (
        "data = cache.encode(Mixture(sys.argv[1]), found, max_length=4).dataset\n"
        "print('there', flush=True); sys.stdin.read(); print(data.tokens.sum())"
    )
    command = elsewhere(data, tokenizer, tmp_path, then)
    a, b, _ = three(data, tokenizer)
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        used(folder, [a, b])
        monkeypatch.setenv("ARDOR_CACHE_SIZE", "1")
        last = encode(Mixture([str(data)]), tokenizer, max_length=40)
        assert entries(folder) == sorted([a, entry_of(last.note)])
        said = process.communicate()[0]
    assert int(said) == Dataset.build(Mixture([str(data)]), tokenizer, max_length=4).tokens.sum()
    encode(Mixture([str(data)]), tokenizer, max_length=50)
    assert a not in entries(folder)


def test_nothing_but_entries_and_dead_streams_is_removed(data, tokenizer, folder, monkeypatch):
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "mine.txt").write_text("x" * 100)
    dead, live = folder / ".stream-dead", folder / ".stream-live"
    for place in (dead, live):
        place.mkdir()
    for place in (dead, live):
        store = FileStore(place)
        if place is dead:
            store.close()
    monkeypatch.setenv("ARDOR_CACHE_SIZE", "0")
    encode(Mixture([str(data)]), tokenizer)
    assert (folder / "notes" / "mine.txt").exists() and live.exists() and not dead.exists()
    store.close()


def test_no_amount_is_told_before_anything_is_encoded(data, tokenizer, folder, monkeypatch):
    monkeypatch.setenv("ARDOR_CACHE_SIZE", "plenty")
    with pytest.raises(ConfigError, match="ARDOR_CACHE_SIZE: 'plenty' is no amount of memory"):
        encode(Mixture([str(data)]), tokenizer)
    assert entries(folder) == []


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


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_at(event: str, monkeypatch) -> None:
    """Let the disk be full from some moment of writing an entry on."""
    append, calls = FileStore.append, []

    def appended(self, *given, **named):
        calls.append(1)
        if len(calls) > 10:
            for file in self.files.values():
                os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        append(self, *given, **named)
        if len(calls) > 10:
            self.files["tokens"].flush()

    match event:
        case "its folder":
            real = Path.mkdir

            def mkdir(path, *given, **named):
                return no_room() if ".partial-" in path.name else real(path, *given, **named)

            monkeypatch.setattr(Path, "mkdir", mkdir)
        case "its first file":
            monkeypatch.setattr(FileStore, "__init__", no_room)
        case "half of its rows":
            monkeypatch.setattr(FileStore, "append", appended)
        case "its description":
            monkeypatch.setattr(cache, "write_json", no_room)
        case "the flush":
            monkeypatch.setattr(os, "fsync", no_room)
        case "the rename":
            monkeypatch.setattr(os, "rename", no_room)


@pytest.mark.parametrize(
    "event",
    [
        "its folder",
        "its first file",
        "half of its rows",
        "its description",
        "the flush",
        "the rename",
    ],
)
def test_a_disk_that_is_full_at_any_moment_is_done_without(
    event, data, tokenizer, folder, monkeypatch
):
    expected = Dataset.build(Mixture([str(data)]), tokenizer)
    with monkeypatch.context() as full:
        fill_at(event, full)
        found = encode(Mixture([str(data)]), tokenizer)
    assert found.dataset == expected and found.dataset.census == expected.census
    assert (found.note or "").startswith("tokens are in memory, and will be made again next time")
    assert "no space left on the device of" in found.note and "ARDOR_CACHE" in found.note
    assert list(folder.rglob("*")) == []  # hidden ones, too
    again = encode(Mixture([str(data)]), tokenizer)  # with room, it is kept
    assert "tokens: kept in" in (again.note or "") and again.dataset == expected


def test_another_process_may_win(data, tokenizer, folder, monkeypatch):
    expected = encode(Mixture([str(data)]), tokenizer).dataset
    place, read, calls = folder / entries(folder)[0], cache._read, []

    def late(where, form):  # it is not there when asked first, and there when we are done
        calls.append(where)
        return read(where, form) if len(calls) > 1 else None

    def lose(*_):
        raise CheckpointError("cannot write")

    monkeypatch.setattr(cache, "_read", late)
    monkeypatch.setattr(cache, "_describe", lose)
    assert encode(Mixture([str(data)]), tokenizer).dataset == expected and calls == [place] * 2


def test_two_processes_at_once_make_one_entry(data, tokenizer, folder, tmp_path):
    then = "print(cache.encode(Mixture(sys.argv[1]), found).dataset.fingerprint)"
    command = elsewhere(data, tokenizer, tmp_path, then)
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

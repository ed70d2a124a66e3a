"""A write is whole or absent, whatever goes wrong."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardor.errors import CheckpointError
from ardor.files.atomic import atomic_directory, clean_partials, write_atomic
from ardor.files.json import read_json, write_json


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "new" / "a", "één\r\n")
    write_atomic(tmp_path / "new" / "a", b"two")
    assert names(tmp_path / "new") == ["a"]
    assert (tmp_path / "new" / "a").read_bytes() == b"two"


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"no space left .* nothing was changed"):
        write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a: .*nothing was changed"):
        write_atomic(tmp_path / "file" / "a", "")


def test_a_directory_replaces_the_old_one_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_directory(tmp_path / "run") as fresh:
            (fresh / content).write_text(content)
            (fresh / "deep").mkdir()
            assert fresh.name.startswith(".run.partial-")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["deep", "two"]  # nothing of "one" is mixed in


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.EIO, "mine")])
def test_an_error_in_the_body_passes_and_keeps_the_old_directory(tmp_path, error):
    with atomic_directory(tmp_path / "run") as fresh:
        (fresh / "old").write_text("")
    with pytest.raises(type(error), match="mine"), atomic_directory(tmp_path / "run") as fresh:
        (fresh / "new").write_text("")
        raise error
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["old"]


def test_a_full_disk_keeps_the_old_directory(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "run") as fresh:
        (fresh / "old").write_text("")
    with pytest.raises(CheckpointError, match="no space left"), atomic_directory(tmp_path / "run"):
        full_disk()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="no space left"), atomic_directory(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["old"]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "run") as fresh:
        (fresh / "old").write_text("")
    rename = os.rename

    def fails_for_the_new(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_for_the_new)
    with pytest.raises(CheckpointError, match="broken"), atomic_directory(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["old"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_ctrl_c_between_the_renames_of_a_swap_loses_neither(tmp_path, monkeypatch, renames):
    with atomic_directory(tmp_path / "run") as fresh:
        (fresh / "old").write_text("")
    rename, done = os.rename, []

    def interrupted(source, target):
        rename(source, target)
        done.append(target)
        if len(done) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "run") as fresh:
        (fresh / "new").write_text("")
    assert names(tmp_path / "run") == (["old"] if renames == 1 else ["new"])


def test_a_directory_is_not_written_over_a_file(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(CheckpointError, match="is a file"), atomic_directory(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "precious"


def test_a_directory_behind_a_symlink_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    with atomic_directory(tmp_path / "link") as fresh:
        (fresh / "new").write_text("")
    assert names(tmp_path / "disk") == ["run"] and names(tmp_path / "link") == ["new"]


WRITER = """
import itertools, sys
from ardor.files.atomic import atomic_directory
for turn in itertools.count():
    with atomic_directory(sys.argv[1]) as fresh:
        for part in "abc":
            (fresh / part).write_text(str(turn))
"""


def test_a_killed_writer_never_leaves_a_mixed_directory(tmp_path):
    run = tmp_path / "run"
    for delay in (0.0, 0.003, 0.007, 0.011, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run)])
        while not run.exists():
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        clean_partials(tmp_path)
        assert names(tmp_path) == ["run"]
        assert names(run) == ["a", "b", "c"]
        assert len({(run / part).read_text() for part in "abc"}) == 1


def test_a_swap_that_was_cut_between_its_renames_is_finished(tmp_path):
    pid = dead_pid()
    (tmp_path / f".run.replaced-{pid}").mkdir()
    (tmp_path / f".run.replaced-{pid}" / "old").write_text("")
    (tmp_path / f".run.partial-{pid}").mkdir()
    (tmp_path / f".run.partial-{pid}" / "new").write_text("")
    clean_partials(tmp_path)
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["new"]


def test_an_old_directory_that_lost_its_successor_comes_back(tmp_path):
    (tmp_path / f".run.replaced-{dead_pid()}").mkdir()
    clean_partials(tmp_path)
    assert names(tmp_path) == ["run"]


def test_cleaning_keeps_what_a_living_process_writes_and_what_is_not_ours(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = {f".run.partial-{living.pid}", ".git", "run.partial-1", "a"}
    for name in kept:
        (tmp_path / name).mkdir()
    gone = f".metrics.jsonl.partial-{dead_pid()}"
    (tmp_path / gone).write_text("")
    try:
        assert clean_partials(tmp_path) == (gone,)
    finally:
        living.communicate(b"\n")
    assert set(names(tmp_path)) == kept
    assert clean_partials(tmp_path / "nowhere") == ()


def test_json_comes_back_sorted_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None], "a": "é"})
    assert (
        tmp_path / "a.json"
    ).read_text() == '{\n  "a": "é",\n  "b": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": "é", "b": [1, None]}


def test_json_forgives_trailing_commas_outside_strings_only(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "x,}\\",]", "b": [1, 2,\n],}\n')
    assert read_json(tmp_path / "a.json") == {"a": 'x,}",]', "b": [1, 2]}


def test_json_errors_name_the_file_and_the_place(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n  "b" 2}')
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON: .* line 2, column 7"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"b\.json does not exist; found a\.json"):
        read_json(tmp_path / "b.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path)


def test_json_that_python_alone_understands_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert names(tmp_path) == []

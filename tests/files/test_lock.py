"""One writer at a time, whatever became of the last."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from ardor.errors import CheckpointError, ConfigError
from ardor.files.lock import Lock

HOLDER = """
import sys
from pathlib import Path
from ardor.files.lock import Lock
lock = Lock(Path(sys.argv[1]), "wait")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_refused_until_its_holder_is_gone_even_killed(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=r"run is in use by another run; go elsewhere"):
            Lock(path, "go elsewhere")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    Lock(path, "wait").release()


def test_a_lock_ends_with_its_last_reference_and_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("a row\n")
    lock = Lock(path, "wait")
    with pytest.raises(ConfigError):
        Lock(path, "wait")
    del lock
    lock = Lock(path, "wait")
    lock.release()
    lock.release()
    Lock(path, "wait")
    assert path.read_text() == "a row\n"


def test_where_no_file_can_be_locked_nothing_is_refused(tmp_path, monkeypatch):
    def unsupported(handle: int, how: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    locks = [Lock(tmp_path / "metrics.jsonl", "wait") for _ in range(2)]
    assert len(locks) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        Lock(tmp_path / "file" / "metrics.jsonl", "wait")

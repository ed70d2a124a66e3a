"""kill -9 at any moment, and a full disk: nothing that was written is lost, and the run goes on."""

import errno
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from ardor.cli.main import main
from ardor.errors import CheckpointError
from ardor.files import weights
from ardor.files.runs import checkpoints, newest_checkpoint

from .ends import again, assert_only_whole_checkpoints, assert_same_end
from .forked import Ended, Worker

pytestmark = pytest.mark.sweep

STEPS = 8


@pytest.fixture(scope="module")
def command(texts) -> Callable[..., list[str]]:
    """`ardor train` for a fraction of a second, with a checkpoint at all even steps."""
    sizes = "--vocab-size 280 --hidden-size 16 --intermediate-size 24 --num-hidden-layers 1"
    sizes += " --num-attention-heads 2 --max-length 48 --tokens-per-batch 48 --dtype float32"
    steps = f" --max-steps {STEPS} --eval-fraction 0.1 --eval-steps 4 --save-steps 2"

    def args(run: Path) -> list[str]:
        return ["train", str(texts), "-o", str(run), *(sizes + steps).split()]

    return args


@pytest.fixture(scope="module")
def whole(worker, command, tmp_path_factory) -> tuple[Path, Ended]:
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = worker.run(command(run))
    assert ended.code == 0, ended.said
    return run, ended


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(worker, command, whole, tmp_path):
    run, chosen, killed = tmp_path / "run", random.Random(0), 0
    began = time.monotonic()
    worker.run(command(tmp_path / "timed"))
    seconds = time.monotonic() - began
    for _ in range(60):
        # Later and later at most, so that it ends however slow a start is.
        most = seconds * (0.3 + killed / 10)
        ended = worker.run(again(run, command(run)), kill_after=chosen.uniform(0, most))
        assert_only_whole_checkpoints(run)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        killed += 1
    assert killed >= 3
    assert worker.run(again(run, command(run))).code == 0  # nothing left to do, or the rest
    assert_same_end(run, whole[0])


def killed_at(change: int, worker: Worker, command: Any, run: Path) -> str:
    """Kill a run at a change of a file, check what it left, and go on to the end."""
    ended = worker.run(command(run), at=change)
    assert ended.code == -signal.SIGKILL, ended.said
    assert_only_whole_checkpoints(run)
    left = [path.name for path in run.iterdir() if path.name.startswith(".")]
    ended = worker.run(again(run, command(run)))
    assert ended.code == 0, ended.said
    return "\n".join(left)


def test_a_run_killed_while_it_writes_goes_on(worker, command, whole, tmp_path):
    changes = len(whole[1].changes)
    assert changes > 100
    chosen = random.Random(1).sample(range(2, changes + 1), 10)
    left = []
    for change in chosen:
        place = tmp_path / str(change)
        left.append(killed_at(change, worker, command, place))
        assert_same_end(place, whole[0])
    assert any("checkpoint-" in names for names in left)  # some died with half a checkpoint


@pytest.mark.slow
def test_a_run_killed_at_any_change_of_any_file_goes_on(worker, command, whole, tmp_path):
    for change in range(2, len(whole[1].changes) + 1):
        place = tmp_path / str(change)
        killed_at(change, worker, command, place)
        assert_same_end(place, whole[0])


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many KiB; the same, larger, when asked again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kib: int) -> Path:
        remount = "remount," if place.is_mount() else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{remount}size={kib}k", "tmpfs", str(place)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("mounting a small disk needs more rights than this user has")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*"))  # KiB


def test_a_full_disk_is_one_message_and_the_run_goes_on(
    worker, command, whole, small_disk, tmp_path
):
    one = size_of(checkpoints(whole[0])[0])
    run = small_disk(one * 3 // 2) / "run"
    ended = worker.run(command(run))
    assert ended.code == 2, ended.said
    *_, message, hint, last = ended.said.strip().splitlines()
    assert message.startswith("error: no space left on the device of ")
    assert "free some space" in message and "Traceback" not in ended.said
    assert (hint, last) == (
        "then go on from the newest checkpoint with",
        f"  ardor train --config {run}/config.yaml --resume",
    )
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert_only_whole_checkpoints(run)
    small_disk(one * 20)
    ended = worker.run(last.split()[1:])
    assert ended.code == 0, ended.said
    assert_same_end(run, whole[0])


@pytest.mark.parametrize("kib", [8, 24])
def test_a_disk_without_room_for_the_first_checkpoint_is_one_message(
    worker, command, small_disk, kib
):
    run = small_disk(kib) / "run"
    ended = worker.run(command(run))
    assert ended.code == 2, ended.said
    assert "no space left on the device" in ended.said and "Traceback" not in ended.said
    assert not checkpoints(run)


@pytest.mark.parametrize("where", ["weights", "trainer state", "metrics"])
def test_a_disk_that_fills_up_anywhere_leaves_the_earlier_checkpoint(
    command, tmp_path, monkeypatch, capfd, where
):
    run = tmp_path / "run"
    writer = "write_shard" if where == "weights" else "save_file"
    real, writes = getattr(weights, writer), {"n": 0}

    def write(*given, **named):
        writes["n"] += 1
        if writes["n"] == 2:
            if where == "weights":
                given[0].write_bytes(b"a first piece of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            real({}, given[1])  # a first piece of it
            raise SafetensorError("Error while serializing: I/O error: (os error 28)")
        real(*given, **named)

    if where == "metrics":
        from ardor.train import metrics

        def full(self, row):
            if row["step"] == 3:
                with metrics.explained(self._path):
                    raise OSError(errno.ENOSPC, "No space left on device")
            return append(self, row)

        append = metrics.Metrics.append
        monkeypatch.setattr(metrics.Metrics, "append", full)
    else:
        monkeypatch.setattr(weights, writer, write)
    assert main(command(run)) == 2
    said = capfd.readouterr().err
    assert "error: no space left on the device of" in said and "Traceback" not in said
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert_only_whole_checkpoints(run)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert main(again(run, command(run))) == 0
    assert_only_whole_checkpoints(run)
    assert checkpoints(run)[-1].name == f"checkpoint-{STEPS}"


def test_half_a_checkpoint_would_have_been_noticed(whole, tmp_path):
    newest = newest_checkpoint(whole[0])
    assert newest is not None
    half = tmp_path / newest.name
    half.mkdir()
    for file in newest.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    model = half / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        assert_only_whole_checkpoints(tmp_path)

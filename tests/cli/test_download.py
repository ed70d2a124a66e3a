"""`ardor download`: what it takes is said first, and a second time it has nothing to do."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..files.hub_server import CHUNK, COMMIT, MODEL, WEIGHTS, Hub, environment, running, wait_for


@pytest.fixture
def hub():
    with running() as server:
        server.files = MODEL | {"pytorch_model.bin": b"pickle", "README.md": b"card"}
        yield server


def download(hub: Hub, cache: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ardor", "download", "owner/model", *map(str, args)]
    env = environment(hub.url, cache)
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_what_is_taken_is_said_and_a_second_time_nothing_is(tmp_path, hub):
    done = download(hub, tmp_path)
    assert (done.returncode, Path(done.stdout.strip()).name) == (0, COMMIT)
    assert f"owner/model at {COMMIT}: 3 files, 23.04 MB" in done.stderr
    assert f"   23.04 MB  {WEIGHTS}\n" in done.stderr
    hub.asked.clear()
    again = download(hub, tmp_path, "--json")
    assert again.stdout.startswith("{") and again.stdout.count("\n") == 1
    found = json.loads(again.stdout)
    assert found["path"] == done.stdout.strip() and found["commit"] == COMMIT
    assert found["files"] == {name: len(held) for name, held in MODEL.items()}
    assert found["bytes"] == sum(map(len, MODEL.values()))
    assert not any("/resolve/" in line for line in hub.asked)


def test_an_interrupted_download_says_that_it_can_go_on_and_does(tmp_path, hub):
    hub.stalls_after = CHUNK + 1000
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ardor", "download", "owner/model", "-o", str(out)]
    env = environment(hub.url, tmp_path)
    with subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores it, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert hub.stalled.wait(60)
        wait_for(lambda: [*out.rglob("*.incomplete")], size=CHUNK)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted\nwhat has come is kept: the same command goes on from there" in said
    assert not (out / WEIGHTS).exists()
    done = download(hub, tmp_path, "-o", out)
    assert (done.returncode, done.stdout.strip()) == (0, str(out))
    assert (out / WEIGHTS).read_bytes() == MODEL[WEIGHTS]
    assert hub.downloads(WEIGHTS) == ["", f"bytes={CHUNK}-"]
    assert {path.name for path in out.iterdir()} == {*MODEL, ".cache"}


def test_a_name_that_the_hub_does_not_have_ends_with_2(tmp_path, hub):
    hub.files, hub.code = {}, "RepoNotFound"
    done = download(hub, tmp_path, "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "the hub has no model of that name" in json.loads(done.stderr.splitlines()[-1])["message"]
    )

"""Names are found here or on the hub, and every way to fail says what to do."""

import hashlib
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ardor.errors import CheckpointError
from ardor.files.hub import Resolved, resolve

from .hub_server import CHUNK, COMMIT, MODEL, OLDER, WEIGHTS, Hub, environment, running, wait_for


def test_a_directory_is_taken_as_it_stands(tmp_path):
    assert resolve(str(tmp_path)) == Resolved(tmp_path, None)
    assert resolve(tmp_path).path == tmp_path


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(CheckpointError, match="has no revision 'main'"):
        resolve(tmp_path, revision="main")


def test_a_file_points_to_its_directory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"give the directory it is in: {tmp_path}"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["{}/run-one", "./runs/a/b", "../x", "a/b/c", "-x/y"])
def test_what_is_neither_directory_nor_hub_id_is_refused_without_the_network(tmp_path, name):
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve(name.format(tmp_path))


def test_an_empty_name_is_not_the_current_directory():
    with pytest.raises(CheckpointError, match="name is empty"):
        resolve("")


def test_a_mistyped_directory_names_its_neighbours(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    near = re.escape(str(tmp_path / "checkpoint-100"))
    with pytest.raises(CheckpointError, match=rf"near it: {near}"):
        resolve(str(tmp_path / "checkpoint-10"))
    with pytest.raises(CheckpointError, match="nor is"):
        resolve(str(tmp_path / "nowhere" / "checkpoint-10"))


def ask(
    endpoint: str,
    cache: Path,
    *,
    offline: bool = False,
    revision: str | None = None,
    patterns: str = "PATTERNS",
    token: str | None = None,
    into: Path | None = None,
) -> str:
    """The commit and files, or the error, of a process whose hub is at `endpoint`."""
    script = f"""
        from pathlib import Path
        from ardor.errors import CheckpointError
        from ardor.files import hub
        try:
            into = {None if into is None else str(into)!r}
            found = hub.resolve(
                "owner/model", revision={revision!r}, patterns=hub.{patterns},
                into=into and Path(into),
            )
            path, commit = found
            print(commit, *sorted(f.name for f in path.iterdir() if f.name[0] != "."))
        except CheckpointError as error:
            print(error)
    """
    given = {} if token is None else {"HF_TOKEN": token}
    env = environment(endpoint, cache, HF_HUB_OFFLINE=str(int(offline)), **given)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hub():
    with running() as server:
        yield server


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.files = dict(MODEL)
    return hub


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "the hub has no model of that name that you may see"),
        (401, "RepoNotFound", "the hub has no model of that name that you may see"),
        (404, "RevisionNotFound", "owner/model has no revision 'v2'"),
        (403, "GatedRepo", "owner/model is gated: accept its terms"),
        (401, "", "owner/model"),
        (500, "", "owner/model"),
    ],
)
@pytest.mark.sweep
def test_each_refusal_of_the_hub_says_what_to_do(tmp_path, hub, status, code, says):
    hub.status, hub.code = status, code
    assert says in ask(hub.url, tmp_path, revision="v2")


def test_a_download_takes_what_a_model_needs_and_is_found_again_offline(tmp_path, hub):
    wanted = {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json"}
    unwanted = {"modeling.py", "pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx"}
    hub.files = {name: name.encode() for name in wanted | unwanted}
    expected = " ".join([COMMIT, *sorted(wanted)])
    assert ask(hub.url, tmp_path).strip() == expected
    hub.files = {}
    assert ask(hub.url, tmp_path, offline=True).strip() == expected


@pytest.mark.sweep
def test_pickles_are_downloaded_when_asked_for_and_then_without_the_other_weights(tmp_path, hub):
    shard = "pytorch_model-00001-of-00001.bin"
    wanted = {"config.json", shard, "pytorch_model.bin.index.json", "tokenizer.json"}
    unwanted = {"modeling.py", "model.safetensors", "training_args.bin", "optimizer.bin"}
    hub.files = {name: name.encode() for name in wanted | unwanted}
    found = ask(hub.url, tmp_path, patterns="PICKLE_PATTERNS")
    assert found.strip() == " ".join([COMMIT, *sorted(wanted)])


def test_what_is_in_the_cache_serves_a_hub_that_is_down_or_out_of_reach(tmp_path, model):
    first = ask(model.url, tmp_path)
    assert first.startswith(COMMIT)
    model.files, model.status = {}, 503
    assert ask(model.url, tmp_path) == first
    with running() as closed:
        pass
    assert ask(closed.url, tmp_path) == first
    assert "not whole in the local cache" in ask(closed.url, tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLDER), (OLDER, OLDER)]
)
def test_a_branch_a_tag_and_a_commit_lead_to_a_commit(tmp_path, model, revision, commit):
    model.older = MODEL | {"config.json": b"older"}
    assert ask(model.url, tmp_path, revision=revision).split()[0] == commit
    (path,) = tmp_path.glob("hub/models--owner--model/snapshots/*/config.json")
    assert path.read_bytes() == (b"older" if commit == OLDER else b"{}")
    model.files = {}
    offline = ask(model.url, tmp_path, revision=revision, offline=True)
    assert offline.split()[0] == commit


def test_a_revision_that_is_none_is_refused_although_another_is_cached(tmp_path, model):
    ask(model.url, tmp_path)
    assert "has no revision 'v2' on the hub" in ask(model.url, tmp_path, revision="v2")


def test_a_gated_model_needs_the_token(tmp_path, model):
    model.token = "hf_right"
    for token in (None, "hf_wrong"):
        assert "owner/model is gated: accept its terms" in ask(model.url, tmp_path, token=token)
    assert not any(path.stat().st_size for path in tmp_path.glob("hub/*/blobs/*"))
    assert ask(model.url, tmp_path, token="hf_right").startswith(COMMIT)


@pytest.mark.parametrize("directory", [False, True])
def test_a_killed_download_goes_on_where_it_stopped(tmp_path, model, directory):
    into = tmp_path / "out" if directory else None
    model.stalls_after = 2 * CHUNK + 1000
    place = "None" if into is None else f"Path({str(into)!r})"
    script = "from ardor.files.hub import resolve; from pathlib import Path\n"
    script += f"resolve('owner/model', into={place})"
    env = environment(model.url, tmp_path)
    with subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.DEVNULL) as p:
        assert model.stalled.wait(60)
        (partial,) = wait_for(lambda: [*tmp_path.rglob("*.incomplete")], size=2 * CHUNK)
        p.send_signal(signal.SIGKILL)
    assert not list(tmp_path.rglob(WEIGHTS))  # nothing half-written has its name
    assert "not whole in the local cache" in ask(model.url, tmp_path, offline=True)
    assert ask(model.url, tmp_path, into=into).split() == [COMMIT, *sorted(MODEL)]
    assert model.downloads(WEIGHTS) == ["", f"bytes={2 * CHUNK}-"]
    (found,) = {path.resolve() for path in tmp_path.rglob(WEIGHTS)}
    assert found.read_bytes() == MODEL[WEIGHTS]
    assert not partial.exists()


def test_a_connection_that_breaks_is_taken_up_again(tmp_path, model):
    model.breaks_after = CHUNK + 1000
    assert ask(model.url, tmp_path).startswith(COMMIT)
    assert model.downloads(WEIGHTS) == ["", f"bytes={CHUNK}-"]


def test_what_was_left_of_other_contents_is_not_built_upon(tmp_path, model):
    blobs = tmp_path / "hub" / "models--owner--model" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hashlib.sha256(MODEL[WEIGHTS]).hexdigest()}.incomplete"
    partial.write_bytes(b"not its beginning")
    assert "did not arrive as it is on the hub (sha256 differs)" in ask(model.url, tmp_path)
    assert not list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob(WEIGHTS))
    assert ask(model.url, tmp_path).startswith(COMMIT)


def test_a_second_time_nothing_is_downloaded(tmp_path, model):
    into = tmp_path / "out"
    for place in (None, into):
        ask(model.url, tmp_path, into=place)
        model.asked.clear()
        assert ask(model.url, tmp_path, into=place).startswith(COMMIT)
        assert not any("/resolve/" in line for line in model.asked)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_connection_says_at_once_how_to_bring_the_files_over(tmp_path, endpoint):
    for offline in (False, True):
        began = time.monotonic()
        says = ask(endpoint, tmp_path, offline=offline)
        assert "the hub cannot be reached" in says
        assert "ardor download owner/model -o DIRECTORY" in says
        assert time.monotonic() - began < 15  # its client's retries alone take more


def test_a_dataset_out_of_reach_is_told_at_once(tmp_path):
    script = "from ardor.data.sources import read_rows; list(read_rows('owner/rows'))"
    began = time.monotonic()
    env = environment("http://127.0.0.1:9", tmp_path)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "owner/rows is no file or folder here, and the hub cannot be reached" in done.stderr
    assert time.monotonic() - began < 15


def test_importing_the_hub_module_does_not_import_the_client():
    script = "import sys, ardor.files.hub; print('huggingface_hub' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert found.stdout.strip() == b"False"

"""Names are found here or on the hub, and every way to fail says what to do."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ardor.errors import CheckpointError
from ardor.files.hub import Resolved, resolve


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


def ask(endpoint: str, cache, *, offline: bool = False, revision: str | None = None) -> str:
    """The error of `resolve("owner/model")`, in a process whose hub is at `endpoint`."""
    script = f"""
        from ardor.errors import CheckpointError
        from ardor.files.hub import resolve
        try:
            print(resolve("owner/model", revision={revision!r}))
        except CheckpointError as error:
            print(error)
    """
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


class Hub(HTTPServer):
    """A hub that answers every request alike."""

    status, code = 404, ""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        assert isinstance(self.server, Hub)
        self.send_response(self.server.status)
        if self.server.code:
            self.send_header("X-Error-Code", self.server.code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "the hub has no model of that name that you may see"),
        (404, "RevisionNotFound", "owner/model has no revision 'v2'"),
        (403, "GatedRepo", "owner/model is gated: accept its terms"),
        (500, "", "owner/model"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(tmp_path, hub, status, code, says):
    hub.status, hub.code = status, code
    assert says in ask(hub.url, tmp_path, revision="v2")


def test_no_connection_says_how_to_bring_the_files_over(tmp_path):
    with Hub() as closed:
        pass
    says = ask(closed.url, tmp_path)
    assert "the hub cannot be reached" in says and "hf download owner/model" in says
    says = ask(closed.url, tmp_path, offline=True)
    assert "hf download owner/model" in says


def test_importing_the_hub_module_does_not_import_the_client():
    script = "import sys, ardor.files.hub; print('huggingface_hub' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert found.stdout.strip() == b"False"

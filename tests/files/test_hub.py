"""Names are found here or on the hub, and every way to fail says what to do."""

import json
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


def ask(
    endpoint: str,
    cache,
    *,
    offline: bool = False,
    revision: str | None = None,
    patterns: str = "PATTERNS",
) -> str:
    """The commit and files, or the error, of a process whose hub is at `endpoint`."""
    script = f"""
        from ardor.errors import CheckpointError
        from ardor.files import hub
        try:
            found = hub.resolve("owner/model", revision={revision!r}, patterns=hub.{patterns})
            path, commit = found
            print(commit, *sorted(file.name for file in path.iterdir()))
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


COMMIT = "c" * 40


class Hub(HTTPServer):
    """A hub that refuses every request alike, or has one model if `files` is set."""

    status, code = 404, ""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        assert isinstance(self.server, Hub)
        path, files = self.path.partition("?")[0], self.server.files
        name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
        if not files:
            self.reply(self.server.status, b"{}", {"X-Error-Code": self.server.code})
        elif path.startswith("/api/models/owner/model/revision/"):
            self.reply(200, json.dumps({"id": "owner/model", "sha": COMMIT}).encode())
        elif path.startswith("/api/models/owner/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(held), "oid": str(len(held))}
                for name, held in files.items()
            ]
            self.reply(200, json.dumps(tree).encode())
        elif name in files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(files[name])}"'}
            self.reply(200, files[name], headers)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

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

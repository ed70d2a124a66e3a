"""A hub on this machine: one model, as huggingface_hub's client sees it."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT, OLDER = "c" * 40, "b" * 40
LARGE = (".safetensors", ".bin")  # what a repository keeps outside of git, with its sha256


WEIGHTS = "model.safetensors"
CHUNK = 10 << 20  # bytes that the hub's client writes at a time
MODEL = {"config.json": b"{}", WEIGHTS: bytes(range(256)) * 90_000, "tokenizer.json": b"{}  "}


class Hub(ThreadingHTTPServer):
    """One model, owner/model, if it has files; else every request is refused alike."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status, self.code = 404, ""  # of refusals
        self.files: dict[str, bytes] = {}  # at COMMIT
        self.older: dict[str, bytes] = {}  # at OLDER, which the tag v1 names
        self.token: str | None = None  # without it, files are refused: a gated model
        self.stalls_after: int | None = None  # bytes of a large file, once; then nothing more
        self.breaks_after: int | None = None  # the same, but the connection is closed
        self.stalled = threading.Event()
        self.asked: list[str] = []  # "GET /path", and " bytes=5-" of a range

    def commit(self, revision: str) -> str | None:
        names = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER, "feature/x": OLDER}
        return names.get(revision)

    def downloads(self, name: str) -> list[str]:
        """The ranges in which `name` was asked for; "" for all of it."""
        asked = [line.split(" ") for line in self.asked]
        return [
            " ".join(rest)
            for method, path, *rest in asked
            if method == "GET" and path.endswith(f"/{name}") and "/resolve/" in path
        ]


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path, asked = unquote(urlsplit(self.path).path), self.headers.get("Range", "")
        self.server.asked.append(f"{self.command} {path} {asked}".rstrip())
        if not self.server.files:
            self.refuse(self.server.status, self.server.code)
        elif path.startswith("/api/models/owner/model"):
            self.describe(path.removeprefix("/api/models/owner/model").strip("/"))
        elif path.startswith("/owner/model/resolve/"):
            revision, _, name = path.removeprefix("/owner/model/resolve/").partition("/")
            self.send_file(self.server.commit(revision), name)
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def held(self, commit: str | None) -> dict[str, bytes]:
        return self.server.older if commit == OLDER else self.server.files

    def describe(self, rest: str) -> None:
        kind, _, revision = rest.partition("/")
        commit = self.server.commit(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = self.held(commit)
        sums = {name: hashlib.sha256(held).hexdigest() for name, held in files.items()}
        lfs = {
            name: {"size": len(held), "pointerSize": 100, "sha256": sums[name], "oid": sums[name]}
            for name, held in files.items()
            if name.endswith(LARGE)
        }
        if kind == "tree":
            found = [
                {"type": "file", "path": name, "size": len(held), "oid": sums[name][:40]}
                | ({"lfs": lfs[name]} if name in lfs else {})
                for name, held in files.items()
            ]
            self.send(200, json.dumps(found).encode())
            return
        siblings = [
            {"rfilename": name, "size": len(held), "blobId": sums[name][:40]}
            | ({"lfs": lfs[name]} if name in lfs else {})
            for name, held in files.items()
        ]
        found = {"id": "owner/model", "sha": commit, "siblings": siblings}
        self.send(200, json.dumps(found).encode())

    def send_file(self, commit: str | None, name: str) -> None:
        server, given = self.server, self.headers.get("Authorization")
        if server.token is not None and given != f"Bearer {server.token}":
            self.refuse(401 if given is None else 403, "GatedRepo")
            return
        files = self.held(commit)
        if commit is None or name not in files:
            self.refuse(404, "EntryNotFound")
            return
        held, large = files[name], name.endswith(LARGE)
        etag = hashlib.sha256(held).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{etag if large else etag[:40]}"',
            "Accept-Ranges": "bytes",
        }
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(held) - 1}/{len(held)}"
        cut = server.stalls_after or server.breaks_after
        if cut is None or not large or self.command == "HEAD":
            self.send(206 if start else 200, held[start:], headers)
            return
        self.begin(206 if start else 200, len(held) - start, headers)
        self.wfile.write(held[start : start + cut])
        self.wfile.flush()
        stalls, server.stalls_after, server.breaks_after = server.stalls_after, None, None
        server.stalled.set()
        if stalls is not None:
            self.connection.recv(1)  # until the client is gone
        self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code})

    def begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.begin(status, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def environment(endpoint: str, cache: Path, **more: str) -> dict[str, str]:
    """Of a process whose hub is at `endpoint`; nothing of this machine's login comes in."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def wait_for(find: Callable[[], list[Path]], *, size: int) -> list[Path]:
    """What `find` gives once it is so many bytes long: the reader may be behind the sender."""
    for _ in range(200):
        found = find()
        if found and found[0].stat().st_size >= size:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{find()} did not grow to {size} bytes")

"""One large file of the hub: what a killed download left is gone on with, and the whole is checked.

The hub's client alone begins a file again when its process was killed.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from ardor.errors import CheckpointError
from ardor.files.atomic import explained


class RemoteFile(NamedTuple):
    """A file of a repository on the hub."""

    name: str
    size: int  # bytes
    sha256: str | None  # of large files; the hub keeps small ones in git


class _Target(NamedTuple):
    """Where a file goes, and where its beginning waits for the rest."""

    path: Path
    partial: Path
    lock: Path


def _in_cache(repository: str, sha256: str) -> _Target:
    """In the hub's cache, where its client looks for a file with these contents."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    blobs = cache / folder / "blobs"
    lock = cache / ".locks" / folder / f"{sha256}.lock"
    return _Target(blobs / sha256, blobs / f"{sha256}.incomplete", lock)


def _in_directory(directory: Path, name: str, sha256: str) -> _Target:
    """In a directory of the user's; what is not whole lies where the hub's client has such."""
    hidden = directory / ".cache" / "huggingface" / "download"
    partial = hidden / f"{name}.{sha256}.incomplete"
    return _Target(directory / name, partial, hidden / f"{name}.{sha256}.lock")


def fetch(
    repository: str, commit: str, file: RemoteFile, directory: Path | None, token: str | None
) -> None:
    """Download one large file into `directory`, or the hub's cache; with a bar on stderr.

    It appears whole or not at all, and nothing is done if it is there. Of two processes, one waits
    for the other.

    Raises: CheckpointError if the contents are not those of the hub, or the place cannot be
    written; what the hub's client raises if the connection breaks: what has come so far is kept.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    assert file.sha256 is not None
    path, partial, lock = (
        _in_cache(repository, file.sha256)
        if directory is None
        else _in_directory(directory, file.name, file.sha256)
    )
    if path.exists():
        return
    with explained(path):
        for parent in {path.parent, partial.parent, lock.parent}:
            parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if path.exists():  # another process was faster
            return
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()
        with open(partial, "ab") as begun:
            http_get(
                hf_hub_url(repository, file.name, revision=commit),
                begun,
                resume_size=begun.tell(),
                headers=build_hf_headers(token=token),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        if _sha256(partial) != file.sha256:
            partial.unlink()
            raise CheckpointError(
                f"{file.name} of {repository} did not arrive as it is on the hub (sha256 differs); "
                "what came was removed: run the same command again"
            )
        os.replace(partial, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

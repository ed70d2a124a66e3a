"""Where a named checkpoint is: a directory as it stands, or a snapshot from the hub."""

import difflib
import errno
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ardor.errors import CheckpointError
from ardor.files.fetch import RemoteFile, fetch

# What a causal language model is read from: never code, never pickles, never other formats.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
)

# What such a model may come with, for those who have said that they trust it.
CODE = ("*.py",)

# The same with pickled weights, for whoever asks for them.
PICKLE_PATTERNS = (
    *(name for name in PATTERNS if not name.startswith("model")),
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)

TIMEOUT = 10.0  # seconds without an answer, after which the hub counts as out of reach

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Resolved(NamedTuple):
    path: Path
    revision: str | None  # the commit of a hub snapshot; None for a directory of the user's


class Listing(NamedTuple):
    """What of a repository is wanted."""

    commit: str
    files: tuple[RemoteFile, ...]


def resolve(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = PATTERNS,
    *,
    into: Path | None = None,
    tell: Callable[[Listing], None] | None = None,
) -> Resolved:
    """The directory of a checkpoint: `name` itself if it is one, else a download by hub id.

    Only files that match `patterns` are downloaded, into the hub's own cache, or the directory
    `into`. What is there already stays; what was cut short goes on where it stopped. `tell` hears
    what there is before anything is downloaded; offline it is not called, and the cache is used.

    Raises: CheckpointError if it is neither, cannot be reached, does not exist, or is gated.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise CheckpointError("the model's name is empty; expected a directory or a hub id")
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a directory, which has no revision {revision!r}; leave revision out"
            )
        return Resolved(path, None)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory it is in: {path.parent}")
    if isinstance(name, Path) or not _REPO_ID.fullmatch(name):
        raise CheckpointError(
            f"{name} is not a directory{_nearest(path)}, and not a hub id like 'owner/model'"
        )
    from huggingface_hub import errors  # later: it is slow to import, and often not needed

    try:
        return _download(name, revision, token, patterns, into, tell)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise CheckpointError(_refusal(name, revision, error)) from error


def _download(
    name: str,
    revision: str | None,
    token: str | None,
    patterns: Sequence[str],
    into: Path | None,
    tell: Callable[[Listing], None] | None,
) -> Resolved:
    from huggingface_hub import errors, snapshot_download

    answer: Exception | None = None
    listing = None
    try:
        listing = listed(name, revision, token, patterns)
    except errors.RevisionNotFoundError:
        raise
    except (errors.HTTPError, OSError) as error:
        answer = error  # what the cache holds whole is as good
    if listing is not None:
        if tell is not None:
            tell(listing)
        for file in listing.files:
            if file.sha256 is not None and not _cached(name, listing.commit, file.name, into):
                fetch(name, listing.commit, file, into, token)
    try:
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            local_dir=into,
            local_files_only=listing is None,  # it would ask the same again, and wait as long
        )
    except errors.LocalEntryNotFoundError as error:
        if isinstance(answer, errors.HfHubHTTPError):
            raise answer from error
        raise
    path = Path(found)
    return Resolved(path, path.name if into is None or listing is None else listing.commit)


def _cached(name: str, commit: str, file: str, into: Path | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return into is None and isinstance(try_to_load_from_cache(name, file, revision=commit), str)


def listed(name: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Listing:
    """The commit that `revision` is now, and its files that match `patterns`.

    Raises: what the hub's client raises.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(
        name, revision=revision, token=token, timeout=TIMEOUT, files_metadata=True
    )
    assert info.sha is not None
    return Listing(
        info.sha,
        tuple(
            RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
            if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        ),
    )


def _refusal(name: str, revision: str | None, error: Exception) -> str:
    """What to do about an exception of the hub's client."""
    from huggingface_hub import errors

    here = f"{name} is not a directory{_nearest(Path(name))}"
    match error:
        case errors.GatedRepoError():
            return (
                f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run "
                "'hf auth login' or set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r} on the hub"
        case errors.RepositoryNotFoundError():
            return (
                f"{here}, and the hub has no model of that name that you may see; if it is "
                "private, set HF_TOKEN"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"the hub refused the token for {name}; set HF_TOKEN to one that is valid"
        case errors.HfHubHTTPError() | errors.HFValidationError():
            return f"the hub refused {name}: {error}"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return (
                f"{here}, not whole in the local cache, and the hub cannot be reached; on a "
                f"connected machine run 'ardor download {name} -o DIRECTORY', copy DIRECTORY "
                "here and give its path"
            )
        case errors.HTTPError():
            return (
                f"the connection broke while downloading {name}: {error}; run the same command "
                "again: it goes on where it stopped"
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for {name} ({error.filename or 'the hub cache'}); what has come is "
            "kept: free some space and run the same command again, or set HF_HOME or give -o "
            "with a directory on another disk"
        )
    return f"cannot download {name}: {error}"


def dataset_unreachable(name: str) -> bool:
    """Whether the hub cannot be reached and has left no copy of the dataset `name` here.

    Its own client would find that out too, after half a minute of trying.
    """
    from huggingface_hub import HfApi, constants, errors

    if (Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir():
        return False
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return False  # it answers; or it need not be asked, as that is no name of a dataset
    except (errors.HTTPError, OSError):
        return True
    return False


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor is {parent})"
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f" (near it: {', '.join(str(parent / found) for found in near)})" if near else ""

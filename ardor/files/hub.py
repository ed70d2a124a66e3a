"""Where a named checkpoint is: a directory as it stands, or a snapshot from the hub."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ardor.errors import CheckpointError

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

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Resolved(NamedTuple):
    path: Path
    revision: str | None  # the commit of a hub snapshot; None for a directory of the user's


def resolve(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> Resolved:
    """The directory of a checkpoint: `name` itself if it is one, else a download by hub id.

    Only files that match `patterns` are downloaded, into the hub's own cache.

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
    return _download(name, revision, token, patterns)


def _download(
    name: str, revision: str | None, token: str | None, patterns: Sequence[str]
) -> Resolved:
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(patterns)
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run "
            "'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a directory{_nearest(Path(name))}, and the hub has no model of that "
            "name that you may see; if it is private, set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a directory{_nearest(Path(name))}, not whole in the local cache, and "
            f"the hub cannot be reached; on a connected machine run 'hf download {name} "
            "--local-dir DIRECTORY', copy DIRECTORY here and give its path"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise CheckpointError(f"the hub refused {name}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot download {name}: {error}") from error
    path = Path(found)
    return Resolved(path, path.name)


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor is {parent})"
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f" (near it: {', '.join(str(parent / found) for found in near)})" if near else ""

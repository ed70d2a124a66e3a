"""Files and directories that appear whole or not at all, whatever kills the writer.

A write goes to a hidden sibling, is flushed to the disk, and is renamed into place. What a killed
writer leaves behind keeps its hidden name: `.NAME.partial-PID` (unfinished, or finished and not yet
in place) or `.NAME.replaced-PID` (the old directory, moved aside for a moment). No reader of ours
opens a name that starts with a dot, and `clean_partials` removes or restores the leftovers.
"""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ardor.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-(?P<pid>\d+)")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` (str as UTF-8) so that a reader finds either the old file or the whole new one.

    Parent directories are made. A symlink at `path` is replaced, not followed.

    Raises: CheckpointError if the disk is full or the place cannot be written; the old file stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _fsync(path.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Generator[Path, None, None]:
    """Yield an empty directory to fill; on success it becomes `path`, replacing what was there.

    If the body raises, the new directory is removed and `path` is as before. If the process is
    killed, a reader of `path` finds the old directory or the new one, whole; or, in the instant
    between two renames, none, with both complete beside it: `clean_partials(path.parent)` then puts
    the new one in place. Two writers of one path must be in different processes, and the last wins.

    Raises: CheckpointError if the disk is full, `path` is a file, or the place cannot be written.
    """
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the name of a directory to write")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A leftover with our own id is of a dead process: ids repeat, above all in containers.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        with explained(path):
            for found in [*partial.rglob("*"), partial]:
                _fsync(found)
            _swap(partial, path)
    except OSError as error:  # the body's own; a full disk is ours to explain
        if full := _full(path, error):
            raise full from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if path.exists():
            os.rename(path, replaced)
        os.rename(new, path)
    except BaseException:  # a Ctrl-C between the two, too
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_partials(parent: str | Path) -> tuple[str, ...]:
    """Tidy what killed writers left in `parent`; returns the hidden names that were dealt with.

    A directory that a swap had finished but not yet named is put in place; the rest is removed.
    Leftovers of a process that still runs on this machine are kept, except our own: call it before
    writing, and not while another machine writes to the same place.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return ()
    done = []
    # "replaced" first: it says that the partial beside it is complete.
    for entry in sorted(parent.iterdir(), key=lambda found: ".partial-" in found.name):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or not entry.exists() or _runs(int(match["pid"])):
            continue
        target = parent / match["name"]
        if match["kind"] == "replaced" and not target.exists():
            new = parent / f".{match['name']}.partial-{match['pid']}"
            os.rename(new if new.exists() else entry, target)
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        done.append(entry.name)
    return tuple(done)


@contextmanager
def explained(path: Path) -> Generator[None, None, None]:
    """Turn an OSError while writing `path` into a CheckpointError with the remedy."""
    try:
        yield
    except OSError as error:
        if full := _full(path, error):
            raise full from error
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; nothing was changed") from error


def _full(path: Path, error: OSError) -> CheckpointError | None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return CheckpointError(
        f"no space left on the device of {path}; nothing was changed; "
        "free some space or write to another disk"
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

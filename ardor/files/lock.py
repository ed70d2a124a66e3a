"""One writer at a time: a lock that the system takes back however its holder ends."""

import fcntl
import os
from pathlib import Path

from ardor.errors import ConfigError
from ardor.files.atomic import explained


class Lock:
    """Held from the start until `release`, or until nothing refers to it, or the process ends.

    `path` is the file that is locked; it is made if it is not there, and never written to. Where
    the file system knows no locks, as on some that are shared, nothing is held and nothing refused.

    Raises: ConfigError if another process (or another Lock of this one) holds it; CheckpointError
    if the file cannot be made.
    """

    def __init__(self, path: Path, remedy: str):
        self._handle: int | None = None
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # For writing, as NFS locks nothing that is only read.
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(f"{path.parent} is in use by another run; {remedy}") from None
        except OSError:  # ENOLCK, ENOSYS, ENOTSUP: no locks here
            self.release()

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.release()

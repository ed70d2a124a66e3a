"""Runs `ardor ARGS` in a child of its own for each line of input, fast enough to kill many.

A line is {"args": [...], "at": n | null, "event": name, "kill_after": seconds | null, "log": path}:
the child is killed after so long, or has one of EVENTS happen to it right before the n-th time that
it changes a file. Each line is answered by how it ended: {"code": n, "changes": [path, ...]}; a
negative code is a signal.
"""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# Some are only here to be imported once for all children.
import safetensors.torch
import torch
import torch._dynamo
from safetensors import SafetensorError

import ardor.cli.finetune
import ardor.cli.train
import ardor.cli.watch
import ardor.train.finetune
import ardor.train.pretrain  # noqa: F401
from ardor.cli.main import main
from ardor.files import weights

for optional in ("bitsandbytes", "schedulefree"):  # seconds of import, in each child otherwise
    with suppress(ImportError):
        import_module(optional)

CHANGES = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "truncate"), (os, "unlink")]
CHANGES += [(os, "mkdir"), (shutil, "rmtree")]


# What takes room on a disk; renaming and removing do not.
WRITES = ("fsync", "mkdir", "save_file")


class Mortal:
    """Notes changes of files, and has an event happen before the one it is told."""

    def __init__(self, at: int | None, event: str):
        self.at, self.event, self.full = at, event, False
        self.changes: list[str] = []  # path of each
        for module, name in CHANGES:
            setattr(module, name, self.counted(getattr(module, name), name))
        weights.save_file = self.save_file

    def counted(self, change: Any, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            held = args[0]
            self.count(name, os.readlink(f"/proc/self/fd/{held}") if name == "fsync" else held)
            return change(*args, **kwargs)

        return run

    def count(self, name: str, path: Any) -> None:
        self.changes.append(str(path))
        if len(self.changes) == self.at:
            EVENTS[self.event](self)
        if self.full and name in WRITES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_file(self, tensors: Any, path: Path, metadata: Any = None) -> None:
        safetensors.torch.save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            self.count("save_file", path)  # half of the file is there
        except OSError as error:
            said = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise SafetensorError(said) from error
        path.write_bytes(whole)

    def fill_disk(self) -> None:
        self.full = True


EVENTS: dict[str, Callable[[Mortal], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "full disk": Mortal.fill_disk,
    "SIGTERM": lambda _: signal.raise_signal(signal.SIGTERM),
    "Ctrl-C twice": lambda _: [signal.raise_signal(signal.SIGINT) for _ in range(2)],
}


def child(args: list[str], at: int | None, event: str, log: str, pipe: int) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    mortal = Mortal(at, event)
    code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(pipe, "w") as told:
        json.dump({"changes": mortal.changes}, told)
    os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(order["args"], order["at"], order["event"], order["log"], write)
        os.close(write)
        if order["kill_after"] is not None:
            time.sleep(order["kill_after"])
            os.kill(pid, signal.SIGKILL)  # which a child that has ended does not notice
        with os.fdopen(read) as pipe:
            said = json.loads(pipe.read() or "{}")  # to its end, which is the child's
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **said}), file=answers)


if __name__ == "__main__":
    serve()

"""Runs `ardor ARGS` in a child of its own for each line of input, fast enough to kill many.

A line is {"args": [...], "die_at": n | null, "kill_after": seconds | null, "log": path}: the child
is killed after so long, or kills itself, as `kill -9` does, right before the n-th time that it
changes a file. Each line is answered by how it ended: {"code": n, "changes": n}; a negative code is
a signal.
"""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# Some are only here to be imported once for all children.
import safetensors.torch
import torch
import torch._dynamo

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


class Mortal:
    """Counts changes of files, and dies before the one it is told."""

    def __init__(self, die_at: int | None):
        self.die_at, self.changes = die_at, 0
        for module, name in CHANGES:
            setattr(module, name, self.counted(getattr(module, name)))
        weights.save_file = self.save_file

    def counted(self, change: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return change(*args, **kwargs)

        return run

    def count(self) -> None:
        self.changes += 1
        if self.changes == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(self, tensors: Any, path: Path, metadata: Any = None) -> None:
        safetensors.torch.save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        self.count()  # half of the file is there
        path.write_bytes(whole)


def child(args: list[str], die_at: int | None, log: str, pipe: int) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    mortal = Mortal(die_at)
    code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, json.dumps({"changes": mortal.changes}).encode())
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
            child(order["args"], order["die_at"], order["log"], write)
        os.close(write)
        if order["kill_after"] is not None:
            time.sleep(order["kill_after"])
            os.kill(pid, signal.SIGKILL)  # which a child that has ended does not notice
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as pipe:
            said = json.loads(pipe.read() or "{}")
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **said}), file=answers)


if __name__ == "__main__":
    serve()

"""Runs `ardor ARGS` as one of several processes, and lets something happen at the start of a step.

STRUCK is {"rank": r, "step": n, "event": "kill" | "full disk" | "interrupt"}: of process r, when n
steps are done.
"""

import errno
import json
import os
import signal
import sys
import time

from ardor.cli.main import main
from ardor.train.trainer import Trainer


def full(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def strike(event: str, trainer: Trainer) -> None:
    if event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, which hands it on
        while not trainer.stop_requested:
            time.sleep(0.01)
    else:
        os.fsync = full


def struck() -> None:
    order, step = json.loads(os.environ["STRUCK"]), Trainer._step

    def then(self, *args):
        if self.ranks.rank == order["rank"] and self.progress.step == order["step"]:
            strike(order["event"], self)
        return step(self, *args)

    Trainer._step = then


if __name__ == "__main__":
    struck()
    sys.exit(main(sys.argv[1:]))

"""The loop of a worker process: say that it is ready, then run one round for each line it reads."""

import json
import sys
import time
from collections.abc import Callable


def serve(rounds: Callable[[], int], *, about: str) -> None:
    """`rounds` does one round of work and returns its tokens; two warm-up rounds come first."""
    for _ in range(2):
        rounds()
    print(json.dumps({"about": about}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        tokens = rounds()
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), flush=True)

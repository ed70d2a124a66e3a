"""The loop of a worker process: say that it is ready, then run one round for each line it reads."""

import json
import sys
import time
from collections.abc import Callable, Iterable


def serve(rounds: Callable[[], tuple[int, float]], *, about: str) -> None:
    """`rounds` works and returns (tokens, seconds); two warm-up rounds come first."""
    for _ in range(2):
        rounds()
    print(json.dumps({"about": about}), flush=True)
    for _ in sys.stdin:
        tokens, seconds = rounds()
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


def timed(work: Callable[[], int]) -> Callable[[], tuple[int, float]]:
    """Rounds of `work`, which returns its tokens, with the seconds of all of it."""

    def rounds() -> tuple[int, float]:
        began = time.perf_counter()
        return work(), time.perf_counter() - began

    return rounds


def after_the_first(tokens: Iterable[object]) -> tuple[int, float]:
    """Decoding alone: tokens after the first, and the seconds since it came."""
    stream = iter(tokens)
    next(stream)
    began = time.perf_counter()
    return sum(1 for _ in stream), time.perf_counter() - began

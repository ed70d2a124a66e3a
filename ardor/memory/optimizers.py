"""What each optimizer keeps of a weight between steps, in bytes."""

import math
from collections.abc import Callable, Mapping

from ardor.memory.shapes import Shape

BLOCK = 256  # numbers of an 8-bit state that share a scale (bitsandbytes)
LEAST_8_BIT = 4096  # numbers of a weight that has 8-bit states

State = Callable[[str, Shape, int], int]
"""(name, shape, bytes of a number) -> bytes"""


def _numbers(count: int) -> State:
    return lambda name, shape, width: count * width * math.prod(shape)


def _eight_bit(count: int) -> State:
    def bytes(name: str, shape: Shape, width: int) -> int:
        n = math.prod(shape)
        if n < LEAST_8_BIT or is_table(name):
            return width * count * n
        return count * (n + 4 * -(-n // BLOCK))

    return bytes


def _adafactor(name: str, shape: Shape, width: int) -> int:
    if len(shape) < 2:
        return width * math.prod(shape)
    *stack, rows, columns = shape
    return 4 * math.prod(stack) * (rows + columns)


def _muon(name: str, shape: Shape, width: int) -> int:
    hidden = len(shape) == 2 and not is_table(name)
    return (1 if hidden else 2) * width * math.prod(shape)


# By name of `optim`; momentum of sgd is one number more.
STATES: Mapping[str, State] = {
    "adamw": _numbers(2),
    "adamw_8bit": _eight_bit(2),
    "lion": _numbers(1),
    "lion_8bit": _eight_bit(1),
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _numbers(0),
    "schedule_free_adamw": _numbers(2),
}


def is_table(name: str) -> bool:
    """Whether a weight is no hidden matrix: a table of tokens or positions, or the head."""
    return any(part in name for part in ("embed", "lm_head", "token_inputs")) or any(
        part in ("wte", "wpe") for part in name.split(".")
    )

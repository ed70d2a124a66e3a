"""Numbers that are held while adapters that begin from the weights are begun.

The weight is taken in float32, and one after the other.
"""

import math

from ardor.memory.shapes import Shape


def _svd(larger: int, smaller: int) -> int:
    """Numbers of both factors, of the copy that LAPACK destroys, and of gesdd's workspace."""
    return 2 * larger * smaller + 5 * smaller * smaller


def factored(begun: str, shape: Shape) -> int:
    """Numbers that are held while the factors of one weight are found; of experts, of all of them
    and one's factors. Of loftq the weight is held whole, expanded, and as what was lost."""
    larger, smaller = max(shape[-2:]), min(shape[-2:])
    match begun:
        case "pissa":
            return math.prod(shape) + _svd(larger, smaller)
        case "loftq":
            return 3 * math.prod(shape) + _svd(larger, smaller)
        case "olora":
            return math.prod(shape) + 2 * larger * smaller + smaller * smaller
    return 0

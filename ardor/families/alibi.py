"""ALiBi: per head, how much a score falls with every position of distance.

Source: Press et al. 2021, arXiv:2108.12409, section 3.
"""


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The paper's: 2^(-8/n), 2^(-16/n), .. for n heads if n is a power of two.

    Else those of the largest such n, then every other one of 2n: as its authors' code has it.
    """
    n = 1 << (heads.bit_length() - 1)
    return _geometric(n, 8.0) + _geometric(2 * n, 8.0)[::2][: heads - n]


def mpt_slopes(heads: int, most: float) -> tuple[float, ...]:
    """MPT's: down to 2^-most; of the next power of two every other one first, then the others."""
    slopes = _geometric(1 << (heads - 1).bit_length(), most)
    if len(slopes) == heads:
        return slopes
    return (slopes[1::2] + slopes[::2])[:heads]


def _geometric(n: int, most: float) -> tuple[float, ...]:
    return tuple(2.0 ** (-most * i / n) for i in range(1, n + 1))

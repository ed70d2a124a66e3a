"""How many of oneDNN's compiled matrix products a process keeps.

A product in 16 bits is compiled for the exact sizes of its matrices. Batches without padding have
another number of rows in each step, and so have experts in each layer, so that almost none is
used twice; but oneDNN keeps the last 1024 of them, and PyTorch's layer over it 1024 more objects,
which grew to 560 MiB. What is used again within a step is some twenty products for each number of
rows, and one is compiled in 0.2 to 0.8 ms.
"""

import os

KEPT = 64
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_products() -> None:
    """Let this process, and those that it starts, keep KEPT products where nobody said otherwise.

    Both libraries look when the first product in 16 bits is computed: in a process that has
    computed one already this changes nothing, and it keeps up to 1024.
    """
    for name in VARIABLES:
        os.environ.setdefault(name, str(KEPT))

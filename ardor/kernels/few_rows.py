"""Matrix products of a few rows, which are bound by reading the weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# oneDNN reads a bfloat16 or float16 weight at half the speed of memory when there is one row to
# multiply; PyTorch's own matrix-vector product reads it at full speed. From a few rows on oneDNN
# wins (benchmarks/decode.py measures it).
FEW = 2


@contextmanager
def few_rows(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the block, linear maps of `rows` rows on CPU take the faster of two equal paths.

    The switch is PyTorch's and process-wide; it is put back when the block ends. It changes which
    kernel multiplies, in what order it sums, and nothing else.
    """
    if device.type != "cpu" or dtype == torch.float32 or rows > FEW:
        yield
        return
    # Not torch.backends.mkldnn.flags: it also sets TF32 modes, which warns, and costs more time.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)

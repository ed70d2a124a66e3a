"""Cross-entropy of rows of logits and its slope, compiled. Call it where `takes(logits)`.

Axes: N rows, V vocabulary.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ardor.kernels.native import NAMES, available, library, threads


def takes(logits: Float[Tensor, "N V"]) -> bool:
    return available(logits) and logits.stride(-1) == 1


def cross_entropy(
    logits: Float[Tensor, "N V"],
    targets: Int64[Tensor, "N"],
    slope: Float[Tensor, "N V"] | None = None,
    factors: Float32[Tensor, "N"] | None = None,
) -> Float32[Tensor, "N"]:
    """-log p of each target in nats; `slope` takes its derivative in the logits, times a factor.

    A column of the softmax that lies more than 87 nats below the largest counts as zero.
    """
    rows, vocab = logits.shape
    count = min(threads(rows * vocab), max(1, rows))
    nats = torch.empty(rows, dtype=torch.float32)
    scratch = torch.empty(count * vocab, dtype=torch.float32)
    getattr(library(), f"cross_entropy_{NAMES[logits.dtype]}")(
        *(logits.data_ptr(), targets.contiguous().data_ptr()),
        *(None if t is None else t.data_ptr() for t in (factors, nats, slope)),
        *(scratch.data_ptr(), rows, vocab, logits.stride(0)),
        0 if slope is None else slope.stride(0),
        count,
    )
    return nats

"""NaN and infinity in stored tensors, in one pass."""

import torch
from torch import Tensor


def not_finite(tensor: Tensor) -> str | None:
    """What of a tensor is no number, as "3 NaN and 1 infinite of 64 values"; None if all are.

    Values that are no floating-point numbers are finite. Reads at the speed of memory: no mask is
    made unless there is something to count.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    if tensor.element_size() < 2:
        tensor = tensor.float()  # float8 has no extrema of its own
    low, high = tensor.aminmax()  # either is NaN if any value is
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return None
    found = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    counts = " and ".join(f"{count:,} {name}" for name, count in found.items() if count)
    return f"{counts} of {tensor.numel():,} values"

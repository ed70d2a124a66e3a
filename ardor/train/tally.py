"""Means of what a step reports beside its loss, over micro-batches and processes."""

from collections.abc import Callable

from torch import Tensor


class Tally:
    """Sums by name, and of how many values each is the sum. `names` are those that may come."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._sums = {name: [0.0, 0.0] for name in names}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name][0] += float(value.detach().double().sum())
            self._sums[name][1] += value.numel()

    def means(self, over_ranks: Callable[[float], float] = float) -> dict[str, float]:
        """The mean of each name that had a value."""
        both = {
            name: (over_ranks(total), over_ranks(count))
            for name, (total, count) in self._sums.items()
        }
        found = {name: total / count for name, (total, count) in both.items() if count}
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            # Where answers do not come in pairs there is only a difference of means.
            margin = found["rewards/chosen"] - found["rewards/rejected"]
            found.setdefault("rewards/margins", margin)
        return found

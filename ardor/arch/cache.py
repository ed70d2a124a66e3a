"""Keys and values of the positions already read. The caller advances; layers write their slice.

Axes: B batch rows, K kv heads, C capacity, S read positions, T new positions, d head width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch.layout import Cached
from ardor.arch.spec import Decoder
from ardor.errors import ShapeError


class KVCache:
    """Storage for `capacity` positions of `rows` sequences, each with a length of its own.

    Size: 2 * layers * rows * kv_heads * capacity * head_width elements of `dtype`.
    """

    def __init__(
        self,
        spec: Decoder,
        *,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.capacity = capacity
        self.past = [0] * rows  # positions held, per row; on the host, so that no step waits for it
        self._layers = [
            torch.zeros(
                2, rows, a.kv_heads, capacity, a.head_width, dtype=dtype, device=device
            )
            for a in (layer.mixer for layer in spec.layers)
        ]  # fmt: skip

    def layout(self, new: int) -> Cached:
        """The layout of `new` further positions in every row.

        Raises: ShapeError if they do not fit.
        """
        if max(self.past) + new > self.capacity:
            raise ShapeError(
                f"{max(self.past)} cached + {new} new positions exceed the cache's capacity of "
                f"{self.capacity}; make it with a larger capacity"
            )
        return Cached(tuple(self.past), new)

    def write(
        self,
        layer: int,
        k: Float[Tensor, "B K T d"],
        v: Float[Tensor, "B K T d"],
        layout: Cached,
    ) -> tuple[Float[Tensor, "B K S d"], Float[Tensor, "B K S d"]]:
        """Store the new positions of one layer; return all that `layout` lets them read."""
        keys, values = self._layers[layer]
        if layout.even:
            new = slice(layout.past[0], layout.past[0] + layout.new)
            keys[:, :, new], values[:, :, new] = k, v
        else:
            for row, past in enumerate(layout.past):
                new = slice(past, past + layout.new)
                keys[row, :, new], values[row, :, new] = k[row], v[row]
        return keys[:, :, : layout.longest], values[:, :, : layout.longest]

    def advance(self, new: int) -> None:
        """Count `new` positions as read in every row, after all layers have written them."""
        self.past = [n + new for n in self.past]

    def row(self, index: int) -> "KVCache":
        """One row as a cache of its own that shares storage: to prefill prompts of any length.

        Its `past` is its own: hand it back with `self.past[index] = row.past[0]`.
        """
        view = object.__new__(KVCache)
        view.capacity, view.past = self.capacity, [self.past[index]]
        view._layers = [kv[:, index : index + 1] for kv in self._layers]
        return view

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`, in that order: finished sequences cost nothing more."""
        self.past = [self.past[r] for r in rows]
        self._layers = [kv[:, rows] for kv in self._layers]

"""Keys and values of the positions already read. The caller advances; layers write their slice.

Axes: B batch rows, K kv heads, C capacity, S read positions, T new positions, d head width.
A layer's planes are its keys and its values, or the latents that both are made from.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch.layout import Cached, Layout
from ardor.arch.spec import Attention, Decoder, LatentAttention
from ardor.errors import ShapeError


def planes_of(mixer: Attention | LatentAttention) -> tuple[int, int, int]:
    """(planes, heads, width) of what a layer keeps of each position."""
    if isinstance(mixer, LatentAttention):
        return 1, 1, mixer.kv_rank + mixer.rope.rotated
    return 2 if mixer.kv_layer is None else 0, mixer.kv_heads, mixer.head_width


class KVCache:
    """Storage for `capacity` positions of `rows` sequences, each with a length of its own.

    Size: 2 * rows * kv_heads * capacity * head_width elements of `dtype` per layer, or with
    latents rows * capacity * (kv_rank + rope.rotated). A layer that reads another's holds nothing.
    """

    def __init__(
        self,
        spec: Decoder,
        *,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device] = "cpu",  # or one for each layer
    ):
        self.capacity = capacity
        self.past = [0] * rows  # positions held, per row; on the host, so that no step waits for it
        ropes = {layer.mixer.rope for layer in spec.layers}
        self._ropes = [rope for rope in ropes if rope is not None]
        one = isinstance(device, torch.device | str)
        devices = [device] * len(spec.layers) if one else device
        shapes = (planes_of(layer.mixer) for layer in spec.layers)
        self._layers = [
            torch.zeros(planes, rows, heads, capacity, width, dtype=dtype, device=place)
            for (planes, heads, width), place in zip(shapes, devices, strict=True)
        ]

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

    def stale(self, new: int) -> list[int]:
        """The rows whose positions would turn otherwise if `new` more were added.

        They must be read again from their start, in one call and with their new end.
        """
        return [
            row
            for row, past in enumerate(self.past)
            if past and any(r.regime(past) != r.regime(past + new) for r in self._ropes)
        ]

    def write(
        self, layer: int, planes: tuple[Float[Tensor, "B K T d"], ...], layout: Cached
    ) -> tuple[Float[Tensor, "B K S d"], ...]:
        """Store the new positions of one layer; return all that `layout` lets them read."""
        held = self._layers[layer]
        for store, plane in zip(held, planes, strict=True):
            if layout.even:
                store[:, :, layout.past[0] : layout.longest] = plane
                continue
            for row, past in enumerate(layout.past):
                store[row, :, past : past + layout.new] = plane[row]
        return held[:, :, :, : layout.longest].unbind()

    def advance(self, new: int) -> None:
        """Count `new` positions as read in every row, after all layers have written them."""
        self.past = [n + new for n in self.past]

    def row(self, index: int) -> "KVCache":
        """One row as a cache of its own that shares storage: to prefill prompts of any length.

        Its `past` is its own: hand it back with `self.past[index] = row.past[0]`.
        """
        view = object.__new__(KVCache)
        view.capacity, view.past, view._ropes = self.capacity, [self.past[index]], self._ropes
        view._layers = [kv[:, index : index + 1] for kv in self._layers]
        return view

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`, in that order: finished sequences cost nothing more."""
        self.past = [self.past[r] for r in rows]
        self._layers = [kv[:, rows] for kv in self._layers]


class Memory:
    """What one call of the decoder may read: what its layers make, after what a cache holds."""

    def __init__(self, spec: Decoder, layout: Layout, cache: KVCache | None):
        self.layout, self.cache = layout, cache
        mixers = (layer.mixer for layer in spec.layers)
        self._shared = {m.kv_layer for m in mixers if isinstance(m, Attention)} - {None}
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def write(
        self, layer: int, planes: tuple[Float[Tensor, "B K T d"], ...]
    ) -> tuple[Float[Tensor, "B K S d"], ...]:
        """Take the new positions of one layer; return all that the layout lets them read."""
        if self.cache is not None:
            assert isinstance(self.layout, Cached)
            planes = self.cache.write(layer, planes, self.layout)
        if layer in self._shared:
            self._kept[layer] = planes
        return planes

    def read(self, layer: int, device: torch.device) -> tuple[Float[Tensor, "B K S d"], ...]:
        """What an earlier layer of this call could read, on the device of the one that reads it."""
        return tuple(plane.to(device) for plane in self._kept[layer])

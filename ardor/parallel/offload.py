"""A decoder that computes on several devices, and with weights that are fetched for their turn.

Set from outside, by hooks on its parts: the decoder itself names no device.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ardor.errors import ConfigError

PAGE = 4096  # bytes; a larger page is only touched more often


@runtime_checkable
class Pages(Protocol):
    """Where in a file the bytes of a tensor are mapped from."""

    def expect(self) -> None: ...
    def give_back(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """A module of a decoder that is moved as one, and where it lies and computes."""

    name: str
    device: torch.device  # where it computes
    kept: Literal["device", "cpu", "disk"] = "device"

    @property
    def in_place(self) -> bool:
        """Whether it is used as it is mapped, and no copy is made."""
        return self.kept == "disk" and self.device.type == "cpu"


@dataclass(frozen=True)
class _Fetched:
    """What a part's turn needs, and what tells that it has arrived (on an accelerator)."""

    tensors: dict[str, Tensor]
    arrived: torch.Event | None


class Turns:
    """Has every part of a decoder compute where it should, with its weights there for its turn.

    Parts are in the order in which they compute. While one computes, the next that is kept
    elsewhere is fetched in a thread; after its turn a part is let go. `resident` counts the bytes
    that are fetched now, `peak` the most that ever were: those of two neighbours.
    """

    def __init__(
        self, decoder: Any, parts: Sequence[Part], pages: Mapping[int, Pages], *, head: str
    ):
        self.parts = {part.name: part for part in parts}
        self.resident = self.peak = 0
        self._decoder, self._pages, self._head = decoder, pages, head
        self._away = [part.name for part in parts if part.kept != "device"]
        self._entry = parts[0].device
        self._crosses = len({part.device for part in parts}) > 1
        self._thread: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[_Fetched]] = {}
        self._homes: dict[str, dict[str, Tensor]] = {}
        self._present: set[str] = set()  # parts whose weights are given with the call
        self._tables: dict[torch.device, tuple[Any, Any]] = {}
        before = True  # the layers
        for part in parts:
            before = before and not part.name.startswith("layers.")
            self._hook(part, gathers=before)
        self._wrap_head()

    def _hook(self, part: Part, *, gathers: bool) -> None:
        module = self._decoder.get_submodule(part.name)

        def begin(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._begin(part, args)
            return (self._moved(args, part.device), self._moved(kwargs, part.device))

        def end(_: nn.Module, __: Any, out: Any) -> Any:
            self._end(part)
            # What comes before the layers is added up where the ids are.
            return self._moved(out, self._entry) if gathers else None

        if self._crosses or part.kept != "device":
            module.register_forward_pre_hook(begin, with_kwargs=True)
            module.register_forward_hook(end, always_call=True)

    def _wrap_head(self) -> None:
        """The head gives logits where the ids are; one tied to the embedding has no forward."""
        decoder, part = self._decoder, self.parts[self._head]
        head, head_parts = decoder.head, decoder.head_parts
        tied = self._head != "lm_head"

        def placed(x: Tensor) -> Tensor:
            x = x.to(part.device)
            if not tied:
                return head(x).to(self._entry)
            return self._in_turn(part, lambda: head(x)).to(self._entry)

        def placed_parts() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
            function, values = self._in_turn(part, head_parts)

            def placed_function(x: Tensor, *given: Tensor) -> Tensor:
                self._present.add(part.name)
                try:
                    return function(x.to(part.device), *given).to(self._entry)
                finally:
                    self._present.discard(part.name)

            return placed_function, values

        decoder.head, decoder.head_parts = placed, placed_parts

    def _in_turn(self, part: Part, work: Callable[[], Any]) -> Any:
        self._begin(part, (), last=True)
        try:
            return work()
        finally:
            self._end(part)

    def _moved(self, value: Any, device: torch.device) -> Any:
        """Tensors, and tuples and dicts of them, on the device; anything else as it is."""
        if not self._crosses:
            return value
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            parts = [self._moved(part, device) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, dict) and value:
            source, found = self._tables.get(device, (None, None))
            if source is not value:  # all layers are given the same tables: they are moved once
                found = {key: self._moved(part, device) for key, part in value.items()}
                self._tables[device] = (value, found)
            return found
        return value

    def _begin(self, part: Part, args: Any, *, last: bool = False) -> None:
        if part.kept == "device" or part.name in self._present:
            return
        module = self._decoder.get_submodule(part.name)
        if torch.is_grad_enabled() and _takes_gradient(module, args):
            raise ConfigError(
                f"{part.name} is kept on the {part.kept}, and a gradient cannot pass through "
                "weights that are let go; train a model that lies on its devices as a whole: "
                "leave device_map out, or quantize it"
            )
        fetched = self._take(part)
        self._homes[part.name] = _swapped(module, fetched.tensors)
        if not last:
            self._fetch_next(part)

    def _end(self, part: Part) -> None:
        if part.kept == "device" or part.name not in self._homes:
            return
        module = self._decoder.get_submodule(part.name)
        _swapped(module, self._homes.pop(part.name))
        self._count(-_size(module))
        if part.in_place:
            self._give_back(_tensors(module))

    def _take(self, part: Part) -> _Fetched:
        coming = self._coming.pop(part.name, None)
        if coming is None:
            self._count(_size(self._decoder.get_submodule(part.name)))
        fetched = self._fetched(part) if coming is None else coming.result()
        if fetched.arrived is not None:
            stream = torch.cuda.current_stream(part.device)
            fetched.arrived.wait(stream)
            for tensor in fetched.tensors.values():
                tensor.record_stream(stream)  # or its memory is reused while it is still read
        return fetched

    def _fetch_next(self, part: Part) -> None:
        place = self._away.index(part.name) + 1
        if place == len(self._away) or self._away[place] in self._coming:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "ardor-fetch")
        following = self.parts[self._away[place]]
        self._count(_size(self._decoder.get_submodule(following.name)))
        self._coming[following.name] = self._thread.submit(self._fetched, following)

    def _fetched(self, part: Part) -> _Fetched:
        tensors = _tensors(self._decoder.get_submodule(part.name))
        with torch.inference_mode(False), torch.no_grad():
            if part.kept == "disk":
                self._read(tensors)
            if part.in_place:
                return _Fetched({}, None)
            copies, arrived = _copied(tensors, part.device)
        if part.kept == "disk":
            self._give_back(tensors)
        return _Fetched(copies, arrived)

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        mapped = [t for t in tensors.values() if t.data_ptr() in self._pages]
        for tensor in mapped:
            self._pages[tensor.data_ptr()].expect()
        for tensor in mapped:
            # One byte of each page: what is read in this thread is there when it is computed with.
            tensor.detach().view(-1).view(torch.uint8)[::PAGE].sum()

    def _give_back(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            # What was written to would be lost with its pages.
            if tensor.data_ptr() in self._pages and not tensor._version:
                self._pages[tensor.data_ptr()].give_back()

    def _count(self, change: int) -> None:
        self.resident += change
        self.peak = max(self.peak, self.resident)


def _takes_gradient(module: nn.Module, args: Any) -> bool:
    given = any(isinstance(value, Tensor) and value.requires_grad for value in args)
    return given or any(parameter.requires_grad for parameter in module.parameters())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module).values())


def _swapped(module: nn.Module, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors in the places of others; those that were there."""
    old: dict[str, Tensor] = {}
    for name, tensor in new.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        places: dict[str, Any] = holder._buffers if leaf in holder._buffers else holder._parameters
        there = places[leaf]
        assert there is not None
        old[name], places[leaf] = there, tensor
    return old


def _copied(
    tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], torch.Event | None]:
    def copies(wait: bool) -> dict[str, Tensor]:
        return {
            name: _like(tensor, tensor.to(device, copy=True, non_blocking=not wait))
            for name, tensor in tensors.items()
        }

    if device.type != "cuda":
        return copies(wait=True), None
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        found = copies(wait=False)
        return found, stream.record_event()


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, requires_grad=False)
    return copy

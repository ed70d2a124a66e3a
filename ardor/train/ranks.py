"""Several processes that train one model: each computes a share of every step's micro-batches.

Gradients are summed over processes before they are clipped, and divided by the targets of all, so
that the step is that of one process. Every process holds the whole model and optimizer, and
evaluates all of the held-out data; the first one writes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ardor.errors import ArdorError, ConfigError

T = TypeVar("T")


class PeerLost(ArdorError):
    """Another process of the run ended before its time; whatever it had to say, it has said."""


@contextmanager
def _together() -> Iterator[None]:
    """What libraries say when another process is gone, in our words."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's are plain RuntimeErrors, which name its files.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerLost(
            "another process of this run has ended (its own message, if it could give one, says "
            "why), so this one ends too; no checkpoint is lost"
        ) from error


@dataclass(frozen=True)
class Ranks:
    """This process among `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls, device: torch.device) -> "Ranks":
        """As torchrun says: RANK of WORLD_SIZE. Alone where nothing says so.

        Raises: ConfigError for a WORLD_SIZE without a RANK.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if "RANK" not in os.environ:
            raise ConfigError(f"WORLD_SIZE={count}, but RANK is not set; start with torchrun")
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def take_device() -> None:
        """Use the GPU that torchrun means for this process, before anything is placed on one."""
        if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        return items[self.rank :: self.count]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """A process that had nothing to do, or did not need a weight, adds zeros."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with _together():
                dist.all_reduce(parameter.grad)

    def sum(self, value: float) -> float:
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self._device)
        with _together():
            dist.all_reduce(held)
        return held.item()

    def any(self, claim: bool) -> bool:
        return claim if self.count == 1 else self.sum(float(claim)) > 0

    def wait(self) -> None:
        if self.count > 1:
            with _together():
                dist.barrier()

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every process's, in order; equal shapes."""
        if self.count == 1:
            return [value]
        held = value.to(self._device)
        found = [torch.empty_like(held) for _ in range(self.count)]
        with _together():
            dist.all_gather(found, held)
        return [one.to(value.device) for one in found]

    @property
    def _device(self) -> torch.device:
        cuda = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


ALONE = Ranks()


def leads() -> bool:
    """Whether this process is the one that talks, before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"

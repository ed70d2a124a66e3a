"""A quantized model made ready for training: what is frozen, what becomes float32, and the cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ardor.errors import ConfigError

Upcast = Literal["norms", "peft", "none"]
_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Census:
    """Numbers and bytes by the dtype they are held in; packed weights count as their bytes."""

    bytes: dict[str, int]
    trained: int  # numbers that take a gradient

    @classmethod
    def of(cls, decoder: nn.Module) -> "Census":
        found: dict[str, int] = {}
        for tensor in _held(decoder):
            name = str(tensor.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + tensor.nbytes
        trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
        return cls(dict(sorted(found.items())), trained)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {_mib(size)}" for name, size in self.bytes.items())


@dataclass(frozen=True)
class KbitReport:
    """What `prepare_kbit` found and did."""

    before: Census
    after: Census
    frozen: int  # parameters that took a gradient before
    upcast: tuple[str, ...]  # names of those that are float32 now

    @property
    def bytes_added(self) -> int:
        return self.after.total - self.before.total

    def lines(self) -> tuple[str, ...]:
        """For people, and for the record of a run."""
        shown = ", ".join(self.upcast[:2]) + (", ..." if len(self.upcast) > 2 else "")
        made = f"{len(self.upcast)} made float32 ({shown})" if self.upcast else "none made float32"
        return (
            f"k-bit before: {self.before}; {self.before.trained:,} numbers trained",
            f"k-bit after:  {self.after}; {self.after.trained:,} numbers trained; {made}, "
            f"{_mib(self.bytes_added)} more",
            "k-bit training: no cache is kept, and inputs need no gradient: what is computed twice "
            "(checkpointing) is not reentrant",
        )


@torch.no_grad()
def prepare_kbit(decoder: nn.Module, upcast: Upcast = "norms") -> KbitReport:
    """Freeze every weight of a quantized decoder, and make some of the 16-bit ones float32.

    "norms" takes the norms, whose sums then are exact and whose bytes are few; "peft" everything
    that is not packed, embedding and head too, which can add more than adapters and optimizer
    together; "none" nothing. Done before adapters are added, which are float32 themselves.

    Raises: ConfigError for another `upcast`, and for a model that is not quantized.
    Source: PEFT 0.21, prepare_model_for_kbit_training, whose docstring says norms and whose code
    takes everything.
    """
    if upcast not in ("norms", "peft", "none"):
        raise ConfigError(f"kbit_upcast={upcast!r} is not known; choose norms, peft or none")
    if not any(hasattr(module, "dequantized") for module in decoder.modules()):
        raise ConfigError(
            "prepare_kbit is for a quantized model, and this one is not; its weights need no more "
            "than to be frozen"
        )
    before = Census.of(decoder)
    frozen = sum(p.requires_grad for p in decoder.parameters())
    decoder.requires_grad_(False)
    changed = []
    for name, owner, leaf, parameter in _parameters(decoder):
        norm = "norm" in type(owner).__name__.lower()
        if parameter.dtype in _LOW and (upcast == "peft" or (upcast == "norms" and norm)):
            setattr(owner, leaf, nn.Parameter(parameter.float(), requires_grad=False))
            changed.append(name)
    return KbitReport(before, Census.of(decoder), frozen, tuple(changed))


def _parameters(decoder: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, owner in [*decoder.named_modules()]:
        for leaf, parameter in [*owner.named_parameters(recurse=False)]:
            yield f"{prefix}.{leaf}".lstrip("."), owner, leaf, parameter


def _held(decoder: nn.Module) -> Iterator[Tensor]:
    """Every tensor once: parts of a joined weight share theirs."""
    seen = set()
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if place not in seen:
            seen.add(place)
            yield tensor


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"

"""A decoder without its adapter, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ardor.adapters.lora import LoraLinear, TrainableHead, TrainableTokens, replace


@contextmanager
def without_adapter(decoder: nn.Module) -> Iterator[None]:
    """Put what lies under each adapted module in its place, and then the adapted module again."""
    embedding = getattr(decoder, "embed_tokens", None)
    worn: list[tuple[str, nn.Module, nn.Module | None]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, TrainableHead):
            tied = module.tokens is embedding
            worn.append((name, module, None if tied else module.tokens.base))
        elif isinstance(module, LoraLinear) or (
            module is embedding and isinstance(module, TrainableTokens)
        ):
            worn.append((name, module, module.get_submodule("base")))
    try:
        for name, _, base in worn:
            owner, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(owner), leaf, base)
        yield
    finally:
        for name, module, _ in worn:
            replace(decoder, name, module)

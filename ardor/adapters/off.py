"""A decoder without its adapter, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ardor.adapters.merge import attach, detach


@contextmanager
def without_adapter(decoder: nn.Module) -> Iterator[None]:
    """Put what lies under each adapted module in its place, and then the adapted module again."""
    worn = detach(decoder)
    try:
        yield
    finally:
        attach(decoder, worn)

"""A decoder without its adapter, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ardor.adapters.merge import attach, detach


@contextmanager
def without_adapter(decoder: nn.Module) -> Iterator[None]:
    """The base as it is; then the same modules are where they were."""
    worn = detach(decoder)
    try:
        yield
    finally:
        attach(decoder, worn)

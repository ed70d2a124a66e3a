"""Several datasets as one, in given proportions."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from ardor.data.choices import Part
from ardor.data.readers import Row
from ardor.data.sources import Source
from ardor.errors import ConfigError


class Mixture:
    """The rows of several datasets, one after the other, each knowing its part.

    `weights` are shares that sum to 1: of the examples that are trained on, not of the rows. None
    where no part has a weight: then every example is trained on once an epoch.

    Raises: ConfigError if some parts have a weight and others not; DataError as Source does.
    """

    def __init__(self, data: str | Sequence[Any], *, streaming: bool = False) -> None:
        self.parts = [Part.of(value) for value in ([data] if isinstance(data, str) else data)]
        if not self.parts:
            raise ConfigError("no data are given; name at least one dataset")
        without = [part.path for part in self.parts if part.weight is None]
        if without and len(without) < len(self.parts):
            raise ConfigError(
                f"{', '.join(without)} has no weight, but other data have; give all or none of "
                "them one"
            )
        self.sources = [
            Source(part.path, part.split, streaming=streaming, part=i)
            for i, part in enumerate(self.parts)
        ]

    def __iter__(self) -> Iterator[Row]:
        for source in self.sources:
            yield from source

    def first_rows(self) -> Iterator[Row]:
        """The first row of each file, which has the format of the others."""
        for source in self.sources:
            yield from source.first_rows()

    @property
    def weights(self) -> tuple[Fraction, ...] | None:
        """The share of each part."""
        given = [Fraction(part.weight) for part in self.parts if part.weight is not None]
        return tuple(weight / sum(given) for weight in given) or None

    def identity(self) -> list[list[str]] | None:
        """What tells these rows from others, whatever the weights; None if nothing does."""
        found = [source.identity() for source in self.sources]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None

    @property
    def bytes(self) -> int | None:
        """Size of the files; None where some part has none."""
        sizes = [source.bytes for source in self.sources]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

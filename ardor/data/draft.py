"""What an example will consist of once its texts are encoded."""

from typing import NamedTuple

from ardor.text.special import Place


class Ids(NamedTuple):
    """Tokens that are known."""

    ids: tuple[int, ...]
    supervised: bool


class Request(NamedTuple):
    """A text to encode: as a prompt (place None), or as a content at that place."""

    text: str
    place: Place | None
    tags: bool
    supervised: bool


Draft = tuple[Ids | Request, ...]

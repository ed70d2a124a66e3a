"""The room that kept tokens may take: entries that were not used for longest make way."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ardor.data.store import remove
from ardor.memory.machine import shown
from ardor.parallel.placement import parse_size

ABOUT = "dataset.json"  # in the folder of an entry; its time is when the entry was last used
STREAM = ".stream-"  # begins the folders of tokens that only their process knows
VARIABLE = "ARDOR_CACHE_SIZE"  # says how much in place of the following
ROOM = 50 << 30  # bytes


def room() -> int:
    """How many bytes entries may take together.

    Raises: ConfigError if $ARDOR_CACHE_SIZE is no amount.
    """
    return parse_size(os.environ.get(VARIABLE, ROOM), VARIABLE)


def make_room(root: Path, most: int) -> str:
    """Remove entries until the others fit in `most` bytes; says for people what there is.

    Those that were not used for longest go first. An entry that any process maps stays, and with it
    perhaps more than `most`; so do folders that hold no entry. Streams that a killed process has
    left behind are no use to anybody and go whatever the room.
    """
    for stream in root.glob(f"{STREAM}*"):
        remove(stream)
    entries = sorted(_entries(root))
    held, stays = sum(one.bytes for one in entries), len(entries)
    for one in entries:
        if held <= most:
            break
        if remove(one.place):
            held, stays = held - one.bytes, stays - 1
    gone = len(entries) - stays
    said = f"{stays} such, {shown(held)} of at most {shown(most)} ({VARIABLE})"
    if gone:
        said += f"; {gone} that {'was' if gone == 1 else 'were'} not used for longest made way"
    return said + ("; the rest is in use" if held > most else "")


class _Entry(NamedTuple):
    used: float  # a time
    place: Path
    bytes: int


def _entries(root: Path) -> Iterator[_Entry]:
    for place in root.iterdir():
        about = place / ABOUT
        # Another process may remove it at this moment.
        with suppress(OSError):
            if not place.name.startswith(".") and about.is_file():
                size = sum(file.stat().st_size for file in place.iterdir())
                yield _Entry(about.stat().st_mtime, place, size)

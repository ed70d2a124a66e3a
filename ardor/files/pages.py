"""Memory that a file is mapped to, given back once it has been read."""

import ctypes
import mmap
import sys

from torch import Tensor

_DONTNEED = 4  # of Linux' madvise


def release(tensor: Tensor) -> None:
    """Let go of the pages of a tensor that is mapped from a file; its values can be read again.

    A page that has been read counts as this process's memory until the system wants it back. Does
    nothing for other memory, on other systems, or to the pages at the tensor's two ends. The tensor
    must not have been written to: what is in the file comes back.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or tensor.device.type != "cpu" or last <= first:
        return
    if _mapped(first, last):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


def _mapped(first: int, last: int) -> bool:
    """Whether one mapping of a file holds the whole range. Anything else would lose its values."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if start <= first and last <= end:
                return len(fields) == 6 and fields[5].startswith("/")
    return False

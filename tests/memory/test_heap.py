"""Memory that a run frees stays with it until it ends."""

import subprocess
import sys

import pytest

from ardor.memory import heap

# Four blocks of 8 MiB that come and go, in a process of its own: faults of the later rounds.
PROBE = """
import resource, torch
from ardor.memory.heap import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(2 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

torch.set_num_threads(1)
with freed_memory_kept():
    faults()
    inside, kept = faults(), resident()
print(inside, kept, resident())
"""

linux_glibc = pytest.mark.skipif(heap._glibc() is None, reason="another C library, or told how")


def probe(**environment) -> list[int]:
    out = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in out.stdout.split()]


@linux_glibc
def test_what_was_freed_comes_back_without_a_fault_and_goes_to_the_system_at_the_end():
    pages = 4 * (8 << 20) // 4096
    inside, kept, after = probe()
    assert inside < pages / 10  # of ten times as many that are touched
    assert kept - after > pages / 2


@linux_glibc
def test_who_says_how_glibc_allocates_is_obeyed():
    inside, _, _ = probe(MALLOC_MMAP_THRESHOLD_="131072")
    assert inside > 5 * 4 * (8 << 20) // 4096

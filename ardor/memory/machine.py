"""The memory that a machine has: this one's, or one that is described."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USABLE = 0.95  # of a memory: the rest is the system's, or the driver's


@dataclass(frozen=True)
class Machine:
    """Bytes of each accelerator, and of the host's memory."""

    gpus: tuple[int, ...]
    ram: int
    name: str = "this machine"

    def summary(self) -> str:
        """For people: "this machine: 2 GPUs of 24.0 GiB, 128.0 GiB of memory"."""
        sizes = sorted({*self.gpus}, reverse=True)
        some = [
            f"{n} GPU{'s' * (n > 1)} of {shown(size)}"
            for size in sizes
            if (n := self.gpus.count(size))
        ]
        return f"{self.name}: {', '.join([*some, f'{shown(self.ram)} of memory'])}"


def host_memory() -> int:
    """Bytes of memory; no more than the container that this process is in may have."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([found, *(int(text) for text in texts if text.isdigit())])


def this_machine() -> Machine:
    """The machine that this process is on."""
    import torch  # later: a described machine needs none

    count = torch.cuda.device_count()
    gpus = tuple(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return Machine(gpus, host_memory())


def peak_resident() -> int | None:
    """The most bytes that this process has had resident so far, or since `forget_peak`.

    Linux's VmHWM, which counts pages of mapped files too; None where nobody counts them. Not
    ru_maxrss: a child begins with its parent's.
    """
    return _status("VmHWM")


def forget_peak() -> None:
    """Let `peak_resident` begin anew, where the system allows it."""
    # Some containers have no such file, or forbid to write it: then the peak is the process's.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 if name in lines else None


def shown(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"

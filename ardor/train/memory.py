"""Whether a model that is trained whole can be in this machine's memory, before it is."""

import os
from pathlib import Path

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.spec import Decoder as Spec
from ardor.errors import ConfigError

# float32 weights, their gradients, and AdamW's two moments.
BYTES_PER_PARAMETER = 4 * 4
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def count_parameters(spec: Spec) -> int:
    """How many numbers a decoder of `spec` trains; nothing is allocated."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    return sum(parameter.numel() for parameter in decoder.parameters())


def physical_memory(device: torch.device) -> int:
    """Bytes of the device; on a CPU no more than the container this process is in may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([found, *(int(text) for text in texts if text.isdigit())])


def fitting(parameters: int, device: torch.device) -> str:
    """What training takes of the memory there is, for people; activations come on top.

    Raises: ConfigError if it cannot fit, with the numbers.
    """
    needed, there = BYTES_PER_PARAMETER * parameters, physical_memory(device)
    taken = (
        f"{parameters / 1e6:,.1f} M parameters take {_size(needed)} as float32 weights, gradients "
        "and AdamW's two moments"
    )
    if needed > there:
        most = there // BYTES_PER_PARAMETER
        raise ConfigError(
            f"{taken}, and the memory of this machine ({device.type}) is {_size(there)}; "
            f"choose a model of less than {most / 1e6:,.0f} M parameters (another preset, fewer "
            "--num-hidden-layers, a smaller --hidden-size), or a machine with more memory"
        )
    return f"{taken}, of {_size(there)} ({device.type}); activations come on top"


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"

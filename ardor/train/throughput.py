"""How much of what the device can do a run does: model FLOPs utilisation."""

import time
from collections.abc import Callable, Iterable

import torch

from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.memory.flops import listed_peak, step_flops

WORTH = 5e13  # operations of a run from which on it is worth measuring the device first
SIZE, TRIES = 2048, 4  # of the matrix products that measure it


def counter(decoder: CausalLM) -> Callable[[Iterable[int]], int] | None:
    """Operations of training on documents of some lengths; None for a model run by transformers."""
    if not isinstance(decoder, Decoder):
        return None
    spec = decoder.spec
    trained = [(n, p.numel()) for n, p in decoder.named_parameters() if p.requires_grad]
    adapters = sum(count for name, count in trained if "lora_" in name)
    return lambda lengths: step_flops(spec, lengths, full=not adapters, adapters=adapters)


def device_peak(
    device: torch.device, compute: torch.dtype, given: float | None, operations: float
) -> float | None:
    """FLOP/s of the device in a dtype: as given, as listed, or measured where it is worth it."""
    if given is not None:
        return given * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (listed := listed_peak(name, str(compute).removeprefix("torch."))) is not None:
            return listed
    return measured_peak(device, compute) if operations >= WORTH else None


def measured_peak(device: torch.device, compute: torch.dtype) -> float:
    """The fastest of a few products of square matrices, in FLOP/s."""
    a, b = (torch.ones(SIZE, SIZE, device=device, dtype=compute) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * SIZE**3 / best

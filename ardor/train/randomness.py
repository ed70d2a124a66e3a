"""The generators that a run draws from: saved, and restored bit for bit."""

import torch
from torch import Tensor

from ardor.errors import CheckpointError
from ardor.train.ranks import ALONE, Ranks

RNG = "rng"  # the first part of the names of the generators' states


def states(device: torch.device, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Those that dropout, noise and rounding draw from, of every process."""
    found = _named("cpu", ranks.gather(torch.get_rng_state()))
    if device.type == "cuda":
        found |= _named("cuda", ranks.gather(torch.cuda.get_rng_state(device)))
    return found


def restore(tensors: dict[str, Tensor], device: torch.device, ranks: Ranks = ALONE) -> None:
    """Inverse of `states`; takes them out of `tensors`.

    Raises: CheckpointError if they are those of another kind of device, or number of processes.
    """
    held = {name: tensors.pop(name) for name in [*tensors] if name.startswith(f"{RNG}|")}
    if held.keys() != states(device, ranks).keys():
        raise CheckpointError(
            f"the checkpoint has random states {sorted(held)}, not those of a run on "
            f"{device.type} in {ranks.count} process{'es' * (ranks.count > 1)}; resume on the kind "
            "of device, and with as many processes, as it was begun with"
        )
    end = f"|{ranks.rank}" if ranks.count > 1 else ""
    torch.set_rng_state(held[f"{RNG}|cpu{end}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(held[f"{RNG}|cuda{end}"], device)


def _named(kind: str, found: list[Tensor]) -> dict[str, Tensor]:
    if len(found) == 1:
        return {f"{RNG}|{kind}": found[0]}
    return {f"{RNG}|{kind}|{rank}": state for rank, state in enumerate(found)}

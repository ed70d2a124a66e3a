"""How weights are kept, and in what dtype the decoder computes. Resolved once, in `load`."""

from dataclasses import dataclass
from typing import cast

import torch

from ardor.errors import ConfigError

NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """Reductions (norms, softmax, loss) are float32 whatever stands here."""

    weights: torch.dtype
    compute: torch.dtype
    why: str  # for people: where the choice comes from


def dtype_of(name: "str | torch.dtype") -> torch.dtype:
    """The torch dtype of "float32" | "bfloat16" | "float16" (or fp32, bf16, fp16); or itself.

    torch.float64 counts too: for checking what rounding does.

    Raises: ConfigError for anything else.
    """
    if name in (torch.float64, *NAMES.values()):
        return cast(torch.dtype, name)
    found = NAMES.get(str(name).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype {str(name)!r} is not one of auto, {', '.join(NAMES)}")
    return found


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware rather than being emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve(dtype: "str | torch.dtype", stored: torch.dtype, device: torch.device) -> Precision:
    """What `dtype` means for a checkpoint whose weights are `stored`.

    "auto" keeps the weights as they are stored and computes in their dtype, or in float32 where
    the hardware would only emulate it. A name converts the weights and computes in it.
    """
    if dtype != "auto":
        chosen = dtype_of(dtype)
        return Precision(chosen, chosen, "as asked")
    if stored == torch.bfloat16 and not fast_bfloat16(device):
        return Precision(stored, torch.float32, f"{device.type} has no fast bfloat16")
    return Precision(stored, stored, "as stored")


def training_compute(dtype: "str | torch.dtype", device: torch.device) -> Precision:
    """Float32 master weights, activations in bfloat16 where that is fast ("auto") or in `dtype`.

    Raises: ConfigError for float16, whose range needs a loss scaler that Ardor does not have.
    """
    if dtype == "auto":
        fast = fast_bfloat16(device)
        compute = torch.bfloat16 if fast else torch.float32
        why = f"{device.type} has {'' if fast else 'no '}fast bfloat16"
        return Precision(torch.float32, compute, why)
    compute = dtype_of(dtype)
    if compute == torch.float16:
        raise ConfigError(
            "dtype float16 overflows in training without a loss scaler; use bfloat16 or float32"
        )
    return Precision(torch.float32, compute, "as asked")

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
    as_stored: bool = False  # each tensor keeps its own dtype; a checkpoint may hold several

    @property
    def conversion(self) -> torch.dtype | None:
        """What floating-point weights are converted to; None where each stays as it is stored."""
        return None if self.as_stored else self.weights

    def __str__(self) -> str:
        weights, compute = (str(d).removeprefix("torch.") for d in (self.weights, self.compute))
        return f"weights in {weights}, computing in {compute} ({self.why})"


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


def resolve(
    dtype: "str | torch.dtype",
    stored: torch.dtype,
    device: torch.device,
    said: torch.dtype | None = None,
) -> Precision:
    """What `dtype` means for a checkpoint whose first weight is `stored`; config.json has `said`.

    A name converts the weights and computes in it. "auto" is what config.json says, as for
    transformers, and without that the dtype they are stored in; each weight stays as it is stored
    unless the two disagree. It computes in that dtype, but for bfloat16 where the hardware would
    only emulate it: there in float16 on a GPU, and in float32 on a CPU.
    """
    if dtype != "auto":
        chosen = dtype_of(dtype)
        return Precision(chosen, chosen, "as asked")
    weights = said or stored
    why = "as stored"
    if weights != stored:
        names = [str(d).removeprefix("torch.") for d in (weights, stored)]
        why = "config.json says {}, though the files hold {}".format(*names)
    compute = weights
    if weights == torch.bfloat16 and not fast_bfloat16(device):
        compute = torch.float16 if device.type == "cuda" else torch.float32
        why += f"; {device.type} has no fast bfloat16"
    return Precision(weights, compute, why, as_stored=weights == stored)


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

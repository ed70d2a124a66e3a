"""Random weights for a decoder that is trained from scratch."""

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.norm import LayerNorm, RMSNorm

RESIDUAL_WRITERS = ("mixer.o_proj.weight", "down_proj.weight", "token_gate.out_proj.weight")
ZERO = ("bias", "sinks", "correction")


@torch.no_grad()
def initialise(decoder: Decoder, generator: torch.Generator, *, std: float = 0.02) -> None:
    """Normal weights of `std`, zero biases, unit norms; what writes to the residual is scaled down.

    Sinks and routers' corrections start at zero.

    Each of the 2L residual writers starts at std / sqrt(2L), so that the stream's variance does
    not grow with depth. Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    one_plus = {
        f"{name}.weight"
        for name, module in decoder.named_modules()
        if isinstance(module, RMSNorm | LayerNorm) and module.spec.weight == "one_plus"
    }
    residual_std = std * (2 * len(decoder.spec.layers)) ** -0.5
    for name, parameter in decoder.named_parameters():
        if name.endswith(ZERO) or name in one_plus:
            parameter.zero_()
        elif "norm" in name or name.endswith("expert_scale"):
            parameter.fill_(1.0)
        else:
            writes = name.endswith(RESIDUAL_WRITERS)
            parameter.normal_(0.0, residual_std if writes else std, generator=generator)

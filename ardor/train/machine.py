"""What a run asks of the machine that it is on."""

import torch

from ardor.arch.attention import backend_for
from ardor.train.compiled import check_compiler
from ardor.train.config import Optimisation
from ardor.train.optim import optimizer_package
from ardor.train.trackers import check_trackers


def check_machine(config: Optimisation, device: torch.device) -> None:
    """Look for it before anything is read or written.

    Raises: ConfigError for attention that cannot train on `device`, a package that is not
    installed, a dashboard that cannot be sent to, or a compiler that is not there.
    """
    backend_for(config.attn_implementation, device, trains=True)
    optimizer_package(config.optim)
    check_trackers(config.report_to)
    if config.torch_compile:
        check_compiler(device)

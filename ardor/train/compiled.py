"""torch.compile for what is the same in every batch: norms and feed-forwards.

Batches are ragged. Attention depends on where documents end, so that compiling whole layers would
compile again for almost every batch; these parts know only how many positions there are, and one
graph serves all layers and all batches.
"""

import os
import shutil

import torch

from ardor.arch.causal import CausalLM
from ardor.arch.mlp import Mlp
from ardor.arch.norm import LayerNorm, RMSNorm
from ardor.errors import ConfigError
from ardor.train.recompute import ours


def compile_parts(decoder: CausalLM) -> None:
    """Have norms and dense feed-forwards compiled when they are first called.

    Feed-forwards with quantized weights stay as they are: those are expanded by kernels of our own.

    Raises: ConfigError for a model whose layers are not ours, or without a C++ compiler.
    """
    known = ours(decoder, "torch_compile")
    check_compiler(known.device)
    for module in known.layers.modules():
        dense = isinstance(module, Mlp) and not any(
            hasattr(part, "dequantized") for part in module.modules()
        )
        if dense or isinstance(module, RMSNorm | LayerNorm):
            module.compile(dynamic=True)
    # Each of training and measuring, with and without gradients, is a graph of its own.
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)


def check_compiler(device: torch.device) -> None:
    """Raises: ConfigError where `device` wants a C++ compiler and there is none."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not any(map(shutil.which, (compiler, "clang++"))):
        raise ConfigError(
            f"torch_compile wants a C++ compiler, and there is no {compiler} or clang++; install "
            "one, or leave it out"
        )

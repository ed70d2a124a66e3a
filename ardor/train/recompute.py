"""Activations that are computed again in the backward pass instead of being kept.

Source: Chen et al. 2016, arXiv:1604.06174; of parts of a layer, Korthikanti et al. 2022,
arXiv:2205.05198, section 5.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ardor.arch.causal import CausalLM
from ardor.arch.decoder import Decoder
from ardor.errors import ConfigError
from ardor.train.config import Recompute


def ours(decoder: CausalLM, setting: str) -> Decoder:
    """Raises: ConfigError for a model whose layers are not ours, which `setting` changes."""
    if not isinstance(decoder, Decoder):
        raise ConfigError(
            f"{setting} is for models that Ardor runs itself, and this one is run by "
            "transformers; leave it out"
        )
    return decoder


def recompute(decoder: CausalLM, what: Recompute) -> None:
    """Let `decoder` keep less in training.

    "layers": of each layer its input only. "selective": of each feed-forward its input only; what
    is computed again is gate and up, while attention and the last product are kept. Gradients are
    the same, bit for bit, as dropout draws again what it drew.

    Raises: ConfigError for a model whose layers are not ours.
    """
    if what == "none":
        return
    layers: Any = ours(decoder, f"gradient_checkpointing={what}").layers
    for layer in layers:
        if what == "layers":
            _again(layer)
        else:
            _again(layer.ffn)


def _again(module: nn.Module) -> None:
    forward = module.forward

    def run(*given: Any) -> Any:
        if not module.training:
            return forward(*given)
        return checkpoint(forward, *given, use_reentrant=False)

    module.forward = run

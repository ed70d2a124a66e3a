"""NEFTune: noise on the embeddings while a model is fine-tuned.

Source: Jain et al. 2023, arXiv:2310.05914, section 2.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ardor.arch.causal import CausalLM
from ardor.errors import ConfigError


class Noise:
    """Adds alpha / sqrt(L D) x uniform(-1, 1) to the embeddings of a document of L tokens.

    `lengths` are those of the documents of the row that comes next. Where nothing is trained,
    nothing is added.

    Raises: ConfigError for a model whose embedding is not where ours is.
    """

    def __init__(self, decoder: CausalLM, alpha: float):
        table = getattr(decoder, "embed_tokens", None)
        if not isinstance(table, nn.Module):
            raise ConfigError(
                f"neftune_noise_alpha={alpha:g} is for models that Ardor runs itself, and this "
                "one is run by transformers; leave it out"
            )
        self.alpha = alpha
        self.lengths: tuple[int, ...] = ()
        table.register_forward_hook(self._add)

    def _add(self, module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        lengths = torch.tensor(self.lengths, device=embedded.device)
        reach = (self.alpha / (lengths * embedded.shape[-1]).sqrt()).repeat_interleave(lengths)
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        return embedded + (noise * reach[:, None]).to(embedded.dtype)

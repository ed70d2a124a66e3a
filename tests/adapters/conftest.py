"""Tiny random models of transformers, and the same through our loader."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from ardor.arch.decoder import Decoder
from ardor.families.rules import DiskPart
from ardor.load import load_model

VOCAB = 61

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from the default 0.02, where adapters on a nearly linear model could hide mistakes
    "initializer_range": 0.3,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}


TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


class Pair(NamedTuple):
    """A base model on disk, as both libraries load it, and how to compare the two."""

    kind: str
    path: str
    disk_names: dict[str, DiskPart]

    def ours(self) -> Decoder:
        return load_model(self.path, dtype="float32").decoder

    def theirs(self) -> Any:
        kind = GPT2LMHeadModel if self.kind == "gpt2" else LlamaForCausalLM
        return kind.from_pretrained(self.path).eval()

    def name(self, linear: str) -> str:
        return self.disk_names[linear].name

    @staticmethod
    def logits(model: Any) -> Tensor:
        if isinstance(model, Decoder):
            return model.logits(model.hidden(TOKENS))
        return model(TOKENS).logits

    @staticmethod
    def randomise(parameters: Iterable[Tensor], seed: int = 7) -> None:
        """As if trained: B is not zero any more, and no two matrices are alike."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


@pytest.fixture(scope="session", params=["llama", "llama-tied", "gpt2"])
def pair(request, tmp_path_factory) -> Pair:
    return _pair(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Pair:
    return _pair("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Pair:
    return _pair("gpt2", tmp_path_factory)


def _pair(kind, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    if kind == "gpt2":
        model, embedding = GPT2LMHeadModel(GPT2Config(**GPT2)), "transformer.wte"
    else:
        config = LlamaConfig(**LLAMA, tie_word_embeddings=kind == "llama-tied")
        model, embedding = LlamaForCausalLM(config), "model.embed_tokens"
    path = str(tmp_path_factory.mktemp(kind))
    model.save_pretrained(path)
    loaded = load_model(path, dtype="float32")
    linears = loaded.form.disk_linears()
    return Pair(kind, path, {**linears, "embed_tokens": DiskPart(embedding, 0, 1, False)})

"""Tiny models of transformers with a real tokenizer, as they are on disk and as we load them."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ardor.load import Model, load_model
from ardor.text.tokenizer import Tokenizer

CONTEXT = 48


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Models this small only lose by sharing, and lose much where the cores are shared too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        ["the cat sat on the mat; naïve 你好 🙂 ends here. " * 4], vocab_size=320
    )


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def path(request, tokenizer, tmp_path_factory) -> Path:
    """A directory with more embedding rows than the tokenizer has tokens."""
    return made(request.param, tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory) -> Model:
    return load_model(made("llama", tokenizer, tmp_path_factory), dtype="float32")


def made(family: str, tokenizer: Tokenizer, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    rows = tokenizer.vocab_rows + 7
    # Loud weights: a model near its start says one thing whatever it is given.
    common = {
        "vocab_size": rows,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": tokenizer.special.eos,
        "pad_token_id": None,
    }
    if family == "llama":
        config = LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            **common,
        )
        peer = LlamaForCausalLM(config)
    else:
        config = GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=CONTEXT, **common)
        peer = GPT2LMHeadModel(config)
    folder = tmp_path_factory.mktemp(family)
    peer.save_pretrained(folder)
    tokenizer.save(folder)
    return folder

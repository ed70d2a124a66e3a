"""The surface: a loaded model with everything one does with it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch import spec as specs
from ardor.errors import ConfigError
from ardor.generate.text import Generation, Piece, Settings, chat_prompt, generate, stream
from ardor.load import Model, load_model, tokenizer_of
from ardor.save import save_model
from ardor.score import Score, score_text
from ardor.text.tokenizer import Tokenizer


class LM:
    """A language model: logits, text, chat and scores. `model` holds the parts."""

    def __init__(self, model: Model):
        self.model = model

    @property
    def spec(self) -> specs.Decoder:
        return self.model.decoder.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.model)

    def logits(self, tokens: Tensor | Sequence[Sequence[int]]) -> Float[Tensor, "B T V"]:
        """Float32 logits of the token after each position; rows of ids, each one document."""
        decoder = self.model.decoder
        ids = torch.as_tensor(tokens, device=decoder.device)
        with torch.set_grad_enabled(any(p.requires_grad for p in decoder.parameters())):
            return decoder.logits(decoder.hidden(ids))

    def generate(self, prompt: str | Sequence[str], **settings: Any) -> Any:
        """Continue a prompt, or each of several; a Generation, or a list of them.

        Settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        ids = [self.tokenizer.encode(p) for p in prompts]
        found = generate(self.model, ids, _settings(settings), continues=True)
        return found[0] if isinstance(prompt, str) else found

    def stream(self, prompt: str, **settings: Any) -> Iterator[Piece]:
        """Continue a prompt piece by piece; the last piece has the Generation in `.done`."""
        ids = self.tokenizer.encode(prompt)
        return stream(self.model, ids, _settings(settings), continues=True)

    def chat(self, messages: list[dict[str, str]], **settings: Any) -> Generation:
        """Answer a conversation of {"role": ..., "content": ...} messages."""
        return generate(self.model, [chat_prompt(self.model, messages)], _settings(settings))[0]

    def stream_chat(self, messages: list[dict[str, str]], **settings: Any) -> Iterator[Piece]:
        """`chat`, piece by piece."""
        return stream(self.model, chat_prompt(self.model, messages), _settings(settings))

    def score(self, text: str) -> Score:
        """The log-probability of each token of `text`, and what follows from it."""
        return score_text(self.model, text)

    def save(self, directory: str | Path) -> None:
        """Write the model (or its adapter) as transformers (or PEFT) reads it."""
        save_model(self.model, directory)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    load_in_4bit: bool = False,
    adapter: str | Path | None = None,
    revision: str | None = None,
    low_cpu_mem_usage: bool = True,
) -> LM:
    """Load a hub id, a local directory, an adapter, or the newest checkpoint of a run.

    `torch_dtype` is `dtype` under its older name; `device_map` is one device ("cpu", "cuda:0");
    `load_in_4bit` is quantization="nf4". Memory use is always low; `low_cpu_mem_usage` is accepted.

    Raises: CheckpointError, ConfigError or TextError, naming the file or argument.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ConfigError(f"dtype={dtype} and torch_dtype={torch_dtype} differ; give one")
    if load_in_4bit and quantization not in (None, "nf4", "nf4-dq"):
        raise ConfigError(f"load_in_4bit and quantization={quantization!r} differ; give one")
    return LM(
        load_model(
            name,
            dtype=dtype or torch_dtype or "auto",
            device=_device(device_map),
            attn_implementation=attn_implementation,
            quantization=quantization or ("nf4" if load_in_4bit else None),
            adapter=adapter,
            revision=revision,
        )
    )


def _settings(given: dict[str, Any]) -> Settings:
    stop = given.get("stop", ())
    # A lone string is a sequence too: of its letters.
    return Settings(**given | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)})


def _device(device_map: str | None) -> torch.device:
    try:
        return torch.device(device_map or "cpu")
    except RuntimeError:
        raise ConfigError(
            f"device_map={device_map!r} is not a device; give one such as cpu or cuda:0 "
            "(spreading a model over several devices is not implemented)"
        ) from None

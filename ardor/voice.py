"""What belongs to an adapter beside its weights: template, ends and names of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.errors import ConfigError
from ardor.files.json import read_object
from ardor.load import GENERATION, Model, count_tokens, stops_of
from ardor.text.chat import ChatTemplate
from ardor.text.legacy import has_tokenizer
from ardor.text.stops import StopSet
from ardor.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Voice:
    """How a model is asked, and where its answers end."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    generation_config: dict[str, Any]
    stops: StopSet

    @classmethod
    def of(cls, model: Model) -> "Voice":
        """The one that a model has now."""
        return cls(model.tokenizer, model.template, model.generation_config, model.stops)

    def give(self, model: Model) -> None:
        """Let the model have this one."""
        model.tokenizer, model.template = self.tokenizer, self.template
        model.generation_config, model.stops = self.generation_config, self.stops
        count_tokens(model.decoder, self.tokenizer)


def voice_of(directory: Path, model: Model) -> Voice | None:
    """The voice in an adapter's folder, for this model; None where it has no tokenizer's files.

    Raises: ConfigError if its tokens are not the model's, or more than the model has rows.
    """
    if not has_tokenizer(directory):
        return None
    tokenizer, template = (
        Tokenizer.from_directory(directory),
        ChatTemplate.from_directory(directory),
    )
    if model.tokenizer is not None and not tokenizer.agrees(model.tokenizer):
        raise ConfigError(
            f"{directory} has another tokenizer than {model.source}; take an adapter of this base"
        )
    rows = model.decoder.facts.vocab
    known = rows if model.tokenizer is None else max(rows, model.tokenizer.vocab_rows)
    if tokenizer.vocab_rows > known:
        raise ConfigError(
            f"{directory} adds tokens up to id {tokenizer.vocab_rows - 1}, and {model.source} as "
            f"it is loaded has {rows} rows; load that adapter as the model, the others beside it"
        )
    path = directory / GENERATION
    generation = read_object(path) if path.exists() else {}
    stops = stops_of(tokenizer, template, generation, model.config)
    return Voice(tokenizer, template, generation, stops)


@contextmanager
def speaking(model: Model, voice: Voice | None) -> Iterator[None]:
    """Let the model have a voice (None: its own) for as long as the block lasts."""
    before = Voice.of(model)
    (voice or before).give(model)
    try:
        yield
    finally:
        before.give(model)

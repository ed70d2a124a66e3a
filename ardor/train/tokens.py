"""The tokens of a model that is fine-tuned: new ones, its template, and which rows it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

import numpy as np

from ardor.arch.decoder import Decoder
from ardor.arch.grow import untrained
from ardor.chat_format import CHATML_TOKENS, clone_chat_template, setup_chat_format
from ardor.data.choices import Preferences
from ardor.data.dataset import Dataset
from ardor.data.formats import Content, Conversation, answer_of, explained, read
from ardor.data.mixture import Mixture
from ardor.data.readers import Row
from ardor.errors import ConfigError, DataError
from ardor.load import Model, tokenizer_of
from ardor.text.chat import ChatTemplate
from ardor.text.templates import default_template, template_named
from ardor.text.tokenizer import Tokenizer
from ardor.train.config import Finetune, Reading
from ardor.vocabulary import add_tokens, align, head_rows

Kept = TypeVar("Kept", bound=Reading)

PIECE = 1 << 24  # tokens that are compared at a time


@dataclass(frozen=True)
class Tokens:
    """What was known of a model's tokens before they were changed."""

    template_added: bool
    trained: frozenset[int | None]  # BOS and EOS of its pre-training


def prepare_tokens(config: Reading, model: Model, first: list[Row], seed: int) -> Tokens:
    """Add the tokens and the chat template that a run asks for, and have all files name them.

    `seed` is that of new rows. A model without weights (`ardor.sketch`) is changed the same way.

    Raises: ConfigError or TextError for a template or token that this model cannot have.
    """
    before, special = model.template, tokenizer_of(model).special
    add_tokens(model, config.add_tokens, seed=seed)
    if config.setup_chat_format:
        setup_chat_format(model, seed=seed)
    elif config.clone_chat_template is not None:
        clone_chat_template(model, config.clone_chat_template, seed=seed)
    else:
        model.template = template_for(
            config.chat_template,
            tokenizer_of(model),
            before,
            lambda: chats(first, config.answer_read),
        )
    align(model)
    return Tokens(model.template is not before, frozenset({special.bos, special.eos}))


def with_date(config: Kept, model: Model) -> Kept:
    """`config` with the day that the chat template writes, if it writes one, which the model's
    writes from here on: the rows of a run are the same on whatever day it is resumed."""
    if model.template is None or not model.template.dated:
        return config
    day = config.template_date or model.template.clock().date().isoformat()
    model.template = model.template.at(datetime.fromisoformat(day))
    return replace(config, template_date=day)


def template_for(
    asked: str | None, tokenizer: Tokenizer, own: ChatTemplate | None, needed: Callable[[], bool]
) -> ChatTemplate | None:
    """The template that conversations are rendered by: as asked, the model's own, or a default.

    None where the model has none and nothing in the data needs one (`needed`): a template says that
    a model was trained on it.

    Raises: TextError or ConfigError if what is asked for is unknown, or needs tokens that the
    tokenizer lacks.
    """
    if asked == "chatml" and not {*CHATML_TOKENS} <= tokenizer.added.keys():
        raise ConfigError(
            "chat_template=chatml, but the tokenizer lacks <|im_start|> or <|im_end|>; give "
            "setup_chat_format (--setup-chat-format), which adds and trains them"
        )
    if asked is not None:
        return template_named(asked, tokenizer)
    return default_template(tokenizer) if own is None and needed() else own


def chats(first: list[Row], preferences: Preferences) -> bool:
    """Whether a chat template is needed: texts and completions are learnt without one.

    `first` are the first rows of all files. Raises: DataError if one of them cannot be read.
    """
    return any(isinstance(content_of(row, preferences), Conversation) for row in first)


def content_of(row: Row, preferences: Preferences) -> Content:
    """What of a row is learnt. Raises: DataError naming the row, if it cannot be read."""
    format, content = read(row)
    try:
        return answer_of(content, preferences)
    except DataError as error:
        raise explained(row, format, error) from error


def occurrence(data: Dataset, name_of: Callable[[int], str]) -> Callable[[int], str | None]:
    """Where the data hold a token, for people; None if nowhere. `name_of` names a row by index."""

    def where(id: int) -> str | None:
        for at in range(0, len(data.tokens), PIECE):  # they may be a mapped file
            found = (data.tokens[at : at + PIECE] == id).nonzero()[0]
            if len(found):
                example = int(data.starts.searchsorted(at + found[0], side="right")) - 1
                return name_of(int(data.rows[example]))
        return None

    return where


def row_of_part(data: Dataset, rows: Mixture) -> Callable[[int], str]:
    """A row's name, by its index, where the rows themselves are not in memory."""

    def name(row: int) -> str:
        part = int(np.searchsorted(data.bounds, row, side="right")) - 1
        return f"{rows.parts[part].path}, row {row - data.bounds[part] + 1}"

    return name


def rows_to_train(
    config: Finetune, model: Model, tokens: Tokens
) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """Rows that an adapter trains: of added tokens, and of those in the template never trained.

    Raises: ConfigError if rows that were added are to stay as they are.
    """
    if config.train_control_tokens == "no":
        if model.untrained:
            raise ConfigError(
                f"train_control_tokens=no would leave the rows of {len(model.untrained)} added "
                "tokens as they are for ever; leave it out, or train with method full"
            )
        return ()
    written = _written(model) - tokens.trained
    if config.train_control_tokens == "auto" and not tokens.template_added:
        decoder = model.decoder
        written = {*untrained(decoder, written)} if isinstance(decoder, Decoder) else set()
    return head_rows(model, tuple(sorted(model.untrained | written)))


def _written(model: Model) -> set[int]:
    """The control tokens that the template writes around a question and an answer."""
    if model.template is None:
        return set()
    probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text = model.template.render(probe, add_generation_prompt=True)
    return {part for part in tokenizer_of(model).split(text) if isinstance(part, int)}

"""A chat template for a model that has none: ChatML, or the one of another model."""

import re
from pathlib import Path

from ardor.errors import ConfigError, TextError
from ardor.files.hub import resolve
from ardor.files.runs import chosen_checkpoint
from ardor.load import Model, tokenizer_of
from ardor.text.chat import CHATML_SOURCE, ChatTemplate, terminator
from ardor.text.legacy import has_tokenizer
from ardor.text.tokenizer import Tokenizer
from ardor.vocabulary import add_tokens, align, set_pad

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def setup_chat_format(model: Model, *, replace: bool = False, seed: int = 0) -> tuple[int, ...]:
    """Give a base model ChatML, with tokens of its own; the ids whose rows are still to be trained.

    `<|im_end|>` becomes the EOS and comes first among the stop tokens; none is lost. The padding
    token is another one. A conversation begins with BOS where the tokenizer begins texts so. Tables
    never shrink.

    Raises: ConfigError if the model has a template already (unless `replace`), or as `add_tokens`.
    """
    _require_none(model, replace)
    ids = add_tokens(model, CHATML_TOKENS, special=True, seed=seed)
    _adopt(model, chatml_for(tokenizer_of(model)))
    return tuple(sorted({*ids.values()} & model.untrained))


def clone_chat_template(
    model: Model, source: str | Path, *, replace: bool = False, seed: int = 0
) -> tuple[int, ...]:
    """Give a model the chat template of another (directory, run or hub id); the ids to be trained.

    Of the tokens of `source` those that the template writes are added, under the same flags; what
    it calls BOS and EOS is this model's. The stop token that it writes after an answer comes first.

    Raises: ConfigError if `source` has no template, this model has one (unless `replace`), or the
    template would never end an answer here; CheckpointError or TextError if it cannot be read.
    """
    _require_none(model, replace)
    directory = resolve(str(source), patterns=_TEXT_FILES).path
    if not has_tokenizer(directory):
        directory = chosen_checkpoint(directory) or directory
    template = ChatTemplate.from_directory(directory)
    if template is None:
        raise ConfigError(
            f"{source} has no chat template to take; give a model that was trained to chat"
        )
    theirs, ours = Tokenizer.from_directory(directory), tokenizer_of(model)
    written = [token for token in theirs.added if _writes(template, theirs, token)]
    named = ChatTemplate(template.source, name=f"the chat template of {source}", tokens=ours.names)
    if re.search(r"\beos_token\b", template.source) and ours.special.eos is None:
        raise ConfigError(
            f"the chat template of {source} ends answers with eos_token, which this model lacks; "
            "set eos_token in its tokenizer_config.json"
        )
    _require_end(ours.adding(written), named)
    # Special ones apart: tags such as <think> are written inside of answers, and shown.
    special = [token for token in written if theirs.is_special(theirs.added[token])]
    ids = add_tokens(model, special, special=True, seed=seed)
    ids |= add_tokens(model, [token for token in written if token not in ids], seed=seed)
    _adopt(model, named)
    return tuple(sorted({*ids.values()} & model.untrained))


def chatml_for(tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML that begins as the tokenizer begins a text.

    Without the BOS that a base model has seen in front of everything, its first tokens go astray.
    """
    begins = tokenizer.special.bos is not None and tokenizer.prefix == (tokenizer.special.bos,)
    source = ("{{- bos_token -}}\n" if begins else "") + CHATML_SOURCE
    return ChatTemplate(source, name="ChatML", tokens=tokenizer.names)


def _require_none(model: Model, replace: bool) -> None:
    if model.template is not None and not replace:
        raise ConfigError(
            f"{model.source} has a chat template, which it was trained on; fine-tune it with that, "
            "or say replace=True to train it on another"
        )


def _writes(template: ChatTemplate, theirs: Tokenizer, token: str) -> bool:
    """Does the template spell this token, itself or through a variable other than BOS and EOS?"""
    if token in template.source:
        return True
    kinds = [kind for kind, text in theirs.names.items() if text == token]
    return any(
        kind not in ("bos_token", "eos_token") and re.search(rf"\b{kind}\b", template.source)
        for kind in kinds
    )


def _require_end(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    if terminator(tokenizer, template) is None and tokenizer.special.eos is None:
        raise ConfigError(
            f"{template.name} writes no token after an answer, and this model has no EOS; set "
            "eos_token in its tokenizer_config.json"
        )


def _adopt(model: Model, template: ChatTemplate) -> None:
    try:
        template.render([{"role": "user", "content": "x"}], True)
    except TextError as error:
        raise ConfigError(f"{error}; take another template") from error
    model.template = template
    align(model)
    # Rows are being added anyway, so that no stop token has to pad.
    for strategy in ("auto", "new"):
        if tokenizer_of(model).special.pad in {None, *model.stops.ids}:
            set_pad(model, strategy)

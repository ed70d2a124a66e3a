"""A loaded model's tokens: new ones, the padding token, and files that agree about all of them.

Each function changes a Model in place: its tokenizer, tables, config.json and generation_config.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

from tokenizers import AddedToken

from ardor.adapters.lora import lora_parameters
from ardor.arch.decoder import Decoder
from ardor.arch.grow import rows_for
from ardor.errors import ConfigError
from ardor.form import Growth, Native
from ardor.load import Model, count_tokens, stops_of, tokenizer_of
from ardor.text.chat import terminator

PadStrategy = Literal["auto", "unk", "eos", "new"]

Occurrence = Callable[[int], str | None]
"""Where the data hold a token, such as "data.jsonl, row 3"; None if nowhere."""

NEW_PADS = ("<|pad|>", "<pad>", "[PAD]")
# What released vocabularies hold in reserve, the first kinds made for padding.
_IN_RESERVE = (
    r"<\|finetune_right_pad_id\|>|<\|?pad(ding)?(_token)?\|?>|\[PAD\]|<\|vision_pad\|>",
    r"<\|?(reserved(_special)?(_token)?|dummy|extra|unused|placeholder)_?\d+\|?>",
    r"\[(control|unused)_?\d+\]|<SPECIAL_\d+>",
)
_SILENT = "padding is counted in lengths here, and only other tools read the id"


def add_tokens(
    model: Model, tokens: Sequence[str], *, special: bool = False, seed: int = 0
) -> dict[str, int]:
    """Add `tokens` to the tokenizer and a row for each to the model's tables; their ids.

    Those that the tokenizer has already keep their ids and rows. New rows are drawn around the mean
    of the old ones (see `grow_rows`), in tables of a multiple of 64 rows that never shrink; rows
    in reserve are taken first. `special` tokens are left out of decoded text.

    Raises: ConfigError for a model with an adapter, spread over devices, or run by transformers;
    TextError for a token that cannot be added.
    """
    tokenizer, form, decoder = tokenizer_of(model), model.form, model.decoder
    grown = tokenizer.adding(
        AddedToken(token, normalized=False, special=special) for token in tokens
    )
    found = {token: id for token in tokens if (id := grown.id(token)) is not None}
    made = {token: id for token, id in found.items() if tokenizer.id(token) is None}
    if not made:
        return found
    if not isinstance(form, Native) or model.placement is not None:
        raise ConfigError(
            f"no rows can be added to {model.source}, which transformers runs or which is spread "
            "over devices; load it on one device, or resize it with transformers first"
        )
    if lora_parameters(decoder):
        raise ConfigError(
            f"no rows can be added under an adapter; merge the one on {model.source} first"
        )
    rows, needed = decoder.facts.vocab, max(made.values()) + 1
    growth = Growth(
        made,
        rows=max(rows, rows_for(needed) if needed > rows else rows),
        known=min(tokenizer.vocab_rows, rows),
        seed=seed,
    )
    model.form, model.config = form.grow(decoder, model.config, growth)
    model.growths = (*model.growths, growth)
    model.untrained = model.untrained | {*made.values()}
    model.tokenizer = grown
    count_tokens(decoder, grown)
    align(model)
    return found


def set_pad(
    model: Model, strategy: PadStrategy = "auto", *, occurs: Occurrence | None = None
) -> str:
    """Choose the token that pads batches in other tools, and write it everywhere; why it is it.

    - "auto": the one there is, unless it also ends texts or the data hold it; else one that the
      vocabulary holds in reserve; else UNK where no text becomes it; else EOS.
    - "unk": refused where a text can become it.
    - "eos": EOS stays a target of training, as nothing here is masked by its id.
    - "new": a token of its own, with a row; it is never generated.

    `occurs` says where the data hold a token: what they hold pads nothing.

    Raises: ConfigError if the strategy does not fit this model or these data.
    """
    tokenizer = tokenizer_of(model)
    chosen, why = _CHOICES[strategy](model, occurs or (lambda _: None))
    if chosen != tokenizer.special.pad:
        token = tokenizer_of(model).token(chosen)
        assert token is not None
        model.tokenizer = tokenizer_of(model).naming(pad_token=token)
        align(model)
    return f"padding token: {tokenizer_of(model).token(chosen)!r}, id {chosen} ({why})"


def _auto(model: Model, occurs: Occurrence) -> tuple[int, str]:
    tokenizer, stops = tokenizer_of(model), model.stops.ids
    special, passed = tokenizer.special, []

    def in_data(id: int) -> str | None:
        if where := occurs(id):
            passed.append(f"; not {tokenizer.token(id)!r}, which the data hold: {where}")
        return where

    def found(id: int, why: str) -> tuple[int, str]:
        return id, why + "".join(passed[:1])

    pad, unk = special.pad, special.unk
    if pad is not None and pad not in stops and in_data(pad) is None:
        return found(pad, "the model's own")
    if (reserve := next(_in_reserve(model, in_data), None)) is not None:
        return found(reserve, "in reserve, and in no text")
    if unk is not None and unk not in _used(model) and not _may_hold_unk(model, in_data):
        return found(unk, "UNK, which no text becomes")
    if pad is not None and pad in stops:
        return found(pad, f"the model's own, which also ends texts: {_SILENT}")
    return found(*_eos(model, occurs))


def _unk(model: Model, occurs: Occurrence) -> tuple[int, str]:
    tokenizer = tokenizer_of(model)
    unk = tokenizer.special.unk
    if unk is None:
        raise ConfigError(f"pad_strategy=unk, but {model.source} has no UNK token; choose auto")
    if unk in _used(model):
        raise ConfigError(
            f"pad_strategy=unk, but UNK is {tokenizer.token(unk)!r}, which also begins or ends "
            "texts in this model; choose eos, auto or new"
        )
    if reason := _may_hold_unk(model, occurs):
        raise ConfigError(f"pad_strategy=unk, but {reason}; choose auto, eos or new")
    return unk, "UNK, which no text becomes"


def _eos(model: Model, occurs: Occurrence) -> tuple[int, str]:
    eos = tokenizer_of(model).special.eos
    if eos is None:
        raise ConfigError(
            f"{model.source} has no EOS token that could pad; choose pad_strategy=new"
        )
    return eos, f"EOS, which stays a target of training: {_SILENT}"


def _new(model: Model, occurs: Occurrence) -> tuple[int, str]:
    tokenizer = tokenizer_of(model)
    for token in NEW_PADS:
        id = tokenizer.id(token)
        if id is None:
            id = add_tokens(model, [token], special=True)[token]
            # It is never read, and is no target: nothing could train its row.
            model.untrained = model.untrained - {id}
            return id, f"new, with a row of its own of {model.decoder.facts.vocab:,}"
        if id < model.decoder.facts.vocab and _free(model, id, occurs):
            return id, "in the vocabulary already, and in no text"
    raise ConfigError(
        f"{', '.join(NEW_PADS)} are all tokens in use of this model; choose pad_strategy=auto"
    )


_CHOICES: dict[str, Callable[[Model, Occurrence], tuple[int, str]]] = {
    "auto": _auto,
    "unk": _unk,
    "eos": _eos,
    "new": _new,
}


def _in_reserve(model: Model, occurs: Occurrence) -> Iterator[int]:
    added = sorted(tokenizer_of(model).added.items(), key=lambda pair: pair[1])
    for kind in _IN_RESERVE:
        for token, id in added:
            fits = id < model.decoder.facts.vocab and re.fullmatch(kind, token, re.IGNORECASE)
            if fits and _free(model, id, occurs):
                yield id


def _free(model: Model, id: int, occurs: Occurrence) -> bool:
    """Is the token in nothing that this model reads or writes?"""
    token = tokenizer_of(model).token(id) or ""
    written = model.template is not None and token in model.template.source
    return id not in _used(model) and not written and occurs(id) is None


def _used(model: Model) -> Collection[int | None]:
    special = tokenizer_of(model).special
    return model.stops.ids | {special.bos, special.eos} | {*tokenizer_of(model).prefix}


def _may_hold_unk(model: Model, occurs: Occurrence) -> str | None:
    """Why UNK cannot stand for padding in this model's texts; None if it can."""
    tokenizer = tokenizer_of(model)
    unk = tokenizer.special.unk
    assert unk is not None
    if (where := occurs(unk)) is not None:
        return f"the data hold it: {where}"
    if tokenizer.reaches_unk:
        return "the tokenizer writes UNK for characters that it lacks, so a text can hold it"
    return None


def align(model: Model) -> None:
    """Have the tokenizer, generation_config and config.json name the same special tokens.

    What ends an answer comes first in every list of stop tokens and is the tokenizer's EOS, as
    vLLM and llama.cpp look there; none that a file named before is lost.
    """
    tokenizer = tokenizer_of(model)
    template = model.template
    stop = None if template is None else terminator(tokenizer, template)
    if template is not None and stop is not None and stop != tokenizer.special.eos:
        model.generation_config["eos_token_id"] = _stops(model)
        # A template that writes the EOS by its part would write another token from then on.
        if re.search(r"\beos_token\b", template.source) is None:
            model.tokenizer = tokenizer.naming(eos_token=tokenizer.token(stop) or "")
    ids: dict[str, Any] = {"eos_token_id": _stops(model)}
    special = tokenizer_of(model).special
    ids |= {f"{kind}_token_id": getattr(special, kind) for kind in ("bos", "pad")}
    known = {key: value for key, value in ids.items() if value is not None}
    model.generation_config |= known
    model.config = model.config | known
    text = model.config.get("text_config")
    if isinstance(text, dict):
        model.config["text_config"] = text | {k: v for k, v in known.items() if k in text}
    model.stops = _gathered(model)


def _gathered(model: Model) -> Any:
    return stops_of(model.tokenizer, model.template, model.generation_config, model.config)


def _stops(model: Model) -> int | list[int] | None:
    return _gathered(model).eos_token_id


def head_rows(model: Model, ids: tuple[int, ...]) -> Any:
    """What an adapter trains to learn these tokens: their rows where they are read and written."""
    decoder = model.decoder
    tied = isinstance(decoder, Decoder) and decoder.lm_head is None
    return ids if tied or not ids else {"embed_tokens": ids, "lm_head": ids}

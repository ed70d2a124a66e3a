"""Text in, text out, over `decode`: settings, stop strings, and text as it becomes certain."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ardor.errors import ConfigError
from ardor.generate.decode import Request, StopReason, Token, decode
from ardor.generate.sample import sampler
from ardor.generate.settings import Settings
from ardor.load import Model, tokenizer_of
from ardor.text.chat import prompt_ids
from ardor.text.stream import StreamDecoder
from ardor.text.tokenizer import Tokenizer

CONTINUED = 8  # tokens of a prompt that are decoded together with what continues it
FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Generation:
    """One continuation. `tokens` holds the stop token where one ended it; `text` never does."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, of each token, under the model itself
    stop_reason: StopReason
    prompt_tokens: int

    @property
    def stopped(self) -> bool:
        """Whether the model ended by itself rather than by a limit."""
        return self.stop_reason in ("stop_token", "stop_string")


class Piece(NamedTuple):
    """Text that has become certain; `done` comes with the last one."""

    text: str
    done: Generation | None


def resolve_settings(settings: Settings, generation_config: dict[str, Any]) -> Settings:
    """Fill what was left open from generation_config.json; without do_sample that is greedy.

    A filter asks for samples: it is never given and then passed over because 0 is the default.

    Raises: ConfigError for a stop string that is empty, and so stands in every text, or for a value
    in the file that is no number.
    """
    for key in ("temperature", "repetition_penalty", *FILTERS):
        stated = generation_config.get(key)
        if stated is not None and type(stated) not in (int, float):
            raise ConfigError(
                f"generation_config.json: {key}={stated!r} is not a number; correct or remove it"
            )
    filled: dict[str, Any] = {}
    sampled = bool(generation_config.get("do_sample", False))
    filtered = any(getattr(settings, key) is not None for key in FILTERS)
    if settings.temperature is None:
        stated = generation_config.get("temperature")
        known = 1.0 if stated is None or not sampled else stated
        filled["temperature"] = known if sampled or filtered else 0.0
    if sampled:
        for key in FILTERS:
            if getattr(settings, key) is None:
                # 0 is how files say "off"
                filled[key] = generation_config.get(key) or None
    if settings.repetition_penalty is None:
        filled["repetition_penalty"] = generation_config.get("repetition_penalty") or 1.0
    if "" in settings.stop:
        raise ConfigError("a stop string is empty; give at least one character, or leave it out")
    return replace(settings, **filled)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    continues: bool = False,
) -> list[Generation]:
    """Continue every prompt of ids.

    Samples of one batch share a stream of random numbers; a greedy answer does not depend on what
    else is in the batch. If the text `continues` that of the prompt, the two joined are the text of
    all the ids: some tokenizers write a space at the start of a word, but not of a text.
    """
    writers = [_Writer(tokenizer_of(model), p, continues) for p in prompts]
    for token in decode(model.decoder, prompts, _request(model, settings, writers)):
        writers[token.row].take(token)
    return [writer.finish() for writer in writers]


def stream(
    model: Model, prompt: Sequence[int], settings: Settings, *, continues: bool = False
) -> Iterator[Piece]:
    """`generate` for one prompt; text comes as soon as no later token can change it."""
    writer = _Writer(tokenizer_of(model), prompt, continues)
    for token in decode(model.decoder, [prompt], _request(model, settings, [writer])):
        text = writer.take(token)
        if token.finished is None:
            if text:
                yield Piece(text, None)
            continue
        done = writer.finish()
        yield Piece(done.text[writer.shown - len(text) :], done)


def chat_prompt(model: Model, messages: Sequence[Any], **variables: Any) -> list[int]:
    """The ids of a conversation, up to where the assistant's answer begins.

    `variables` as for `text.chat.prompt_ids`: tools, documents, continue_final_message, and what
    the template itself reads.

    Raises: ConfigError if the model has no chat template; TextError as `prompt_ids`.
    """
    if model.template is None:
        raise ConfigError(
            f"{model.source} has no chat template, so it was not trained to chat; use `generate`, "
            "fine-tune it on messages first, or say which template it was trained on: chat_template"
        )
    return prompt_ids(tokenizer_of(model), model.template, messages, **variables)


def padding_only(model: Model) -> frozenset[int]:
    """The padding token, where it is a control token of its own: then no text contains it."""
    tokenizer = tokenizer_of(model)
    pad, others = tokenizer.special.pad, {tokenizer.special.unk, tokenizer.special.bos}
    if pad is None or pad >= model.decoder.facts.vocab or pad in model.stops.ids | others:
        return frozenset()
    return frozenset({pad}) & tokenizer.control


def _request(model: Model, settings: Settings, writers: "list[_Writer]") -> Request:
    settings = resolve_settings(settings, model.generation_config)
    assert settings.temperature is not None and settings.repetition_penalty is not None
    strings = (*settings.stop, *model.stops.strings)
    for writer in writers:
        writer.strings = strings
    return Request(
        max_new_tokens=settings.max_new_tokens,
        stops=model.stops.ids,
        choose=sampler(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            generator=torch.Generator(model.decoder.device).manual_seed(settings.seed),
        ),
        repetition_penalty=settings.repetition_penalty,
        banned=padding_only(model),
        watch=(lambda row, id_: writers[row].read(id_)) if strings else None,
    )


class _Writer:
    """The text of one row: decoded as it comes, held back while a stop string could begin in it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], continues: bool):
        before = prompt[-CONTINUED:] if continues else ()
        self.strings: tuple[str, ...] = ()
        self._decoder = StreamDecoder(tokenizer)
        self._prompt_tokens = len(prompt)
        self._text = "".join(map(self._decoder.push, before))
        self._start = self._emitted = len(tokenizer.decode(before))
        self._end: int | None = None  # where a stop string begins
        self._read: list[int] = []
        self._tokens: list[Token] = []

    @property
    def shown(self) -> int:
        """Characters that `take` has given."""
        return self._emitted - self._start

    def read(self, id_: int) -> bool:
        """Add a token's text; whether a stop string has now appeared."""
        self._read.append(id_)
        self._text += self._decoder.push(id_)
        found = [at for s in self.strings if (at := self._text.find(s, self._start)) >= 0]
        self._end = min(found, default=None)
        return self._end is not None

    def take(self, token: Token) -> str:
        """Record a token; the text that is certain now and was not before."""
        self._tokens.append(token)
        if len(self._read) < len(self._tokens) and token.finished != "stop_token":
            self.read(token.id)
        certain = self._end if self._end is not None else self._certain()
        text = self._text[self._emitted : certain]
        self._emitted += len(text)
        return text

    def finish(self) -> Generation:
        last = self._tokens[-1].finished
        assert last is not None
        if self._end is None:
            self._text += self._decoder.flush()
        return Generation(
            text=self._text[self._start : self._end],
            tokens=tuple(token.id for token in self._tokens),
            logprobs=tuple(token.logprob for token in self._tokens),
            stop_reason=last,
            prompt_tokens=self._prompt_tokens,
        )

    def _certain(self) -> int:
        """How much of the text no stop string that is still to come can reach into."""
        longest = max(map(len, self.strings), default=1) - 1
        for size in range(min(longest, len(self._text) - self._start), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self.strings):
                return len(self._text) - size
        return len(self._text)

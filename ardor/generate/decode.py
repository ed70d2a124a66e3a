"""Prompt in, tokens out, one at a time: prefill, then a step per token for all unfinished rows.

Axes: B batch rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ardor.arch.causal import Cache, CausalLM
from ardor.errors import ConfigError, ShapeError
from ardor.generate.sample import Choose, greedy, penalise_repetition

StopReason = Literal["stop_token", "stop_string", "length", "context"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What decoding needs to know beyond the prompts; `generate.text` fills it from settings."""

    max_new_tokens: int
    stops: frozenset[int] = frozenset()
    choose: Choose = greedy
    repetition_penalty: float = 1.0
    banned: frozenset[int] = frozenset()  # never chosen, such as a padding token
    watch: Callable[[int, int], bool] | None = None  # (row, id) -> whether its text ends here


@dataclass(frozen=True)
class Token:
    """One decoded token of row `row`."""

    row: int
    id: int
    logprob: float  # nats, under the model itself: before temperature, penalty and filters
    finished: StopReason | None  # why the row ends with this token; None while it goes on


@dataclass
class _Row:
    """A sequence still being written, by its place among the prompts."""

    index: int
    tokens: list[int]
    new: int = 0
    room: int = field(default=0)  # positions left in the model's context


def decode(
    decoder: CausalLM, prompts: Sequence[Sequence[int]], request: Request
) -> Iterator[Token]:
    """Continue every prompt until a stop token, `max_new_tokens`, or the end of the context.

    Prompts may differ in length: each is read into its own row of the cache, so no padding exists.
    Rows that finish are dropped from the batch.

    Raises: ShapeError for an empty prompt, one that leaves no room in the model's context, or an id
    that the model lacks;
    ConfigError for a limit or penalty outside its range.
    """
    rows = [_row(decoder, i, prompt) for i, prompt in enumerate(prompts)]
    if request.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
    if not 0 < request.repetition_penalty < float("inf"):
        raise ConfigError(f"repetition_penalty={request.repetition_penalty} must be above 0")
    if not rows:
        return
    cache, logits = _prefill(decoder, rows, request.max_new_tokens)
    while True:
        ids, logprobs = _choose(logits, rows, request)
        alive = []
        for place, (row, id_, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
            row.tokens.append(id_)
            row.new += 1
            finished = _finished(row, id_, request)
            if finished is None:
                alive.append(place)
            yield Token(row.index, id_, logprob, finished)
        if not alive:
            return
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            cache.keep(alive)
        logits = _step(decoder, cache, rows)


def _row(decoder: CausalLM, index: int, prompt: Sequence[int]) -> _Row:
    if not prompt:
        raise ShapeError(
            f"prompt {index + 1} holds no tokens, and this tokenizer adds none at the start; "
            "give at least one character"
        )
    room = decoder.facts.max_positions - len(prompt)
    if room < 1:
        raise ShapeError(
            f"prompt {index + 1} has {len(prompt)} tokens, but the model's context holds "
            f"{decoder.facts.max_positions}; shorten it"
        )
    decoder.check_ids(prompt)
    return _Row(index, list(prompt), room=room)


# These are in inference mode, and not `decode`: between its tokens a generator would leave the mode
# on for whoever draws them.


@torch.inference_mode()
def _prefill(
    decoder: CausalLM, rows: list[_Row], max_new_tokens: int
) -> tuple[Cache, Float[Tensor, "B V"]]:
    """A cache that has read every prompt, and what comes next in each."""
    capacity = max(len(row.tokens) + min(max_new_tokens, row.room) for row in rows)
    cache = decoder.new_cache(rows=len(rows), capacity=capacity)
    logits = []
    for index, row in enumerate(rows):
        read = torch.tensor([row.tokens], device=decoder.device)
        hidden = decoder.hidden(read, cache=cache.row(index))
        cache.past[index] = len(row.tokens)
        logits.append(decoder.token_logits(hidden[:, -1]))
    return cache, torch.cat(logits)


@torch.inference_mode()
def _step(decoder: CausalLM, cache: Cache, rows: list[_Row]) -> Float[Tensor, "B V"]:
    """Read the last token of every row; what comes next in each."""
    if stale := cache.stale(1):
        return torch.cat([_step_alone(decoder, cache, i, rows, stale) for i in range(len(rows))])
    last = torch.tensor([[row.tokens[-1]] for row in rows], device=decoder.device)
    hidden = decoder.hidden(last, cache=cache)
    cache.advance(1)
    return decoder.token_logits(hidden[:, -1])


def _step_alone(
    decoder: CausalLM, cache: Cache, index: int, rows: list[_Row], stale: list[int]
) -> Float[Tensor, "1 V"]:
    """`_step` of one row, which is read again from its start if it is among the stale."""
    row = cache.row(index)
    if index in stale:
        row.past = [0]
    read = torch.tensor([rows[index].tokens[row.past[0] :]], device=decoder.device)
    hidden = decoder.hidden(read, cache=row)
    cache.past[index] = len(rows[index].tokens)
    return decoder.token_logits(hidden[:, -1])


@torch.inference_mode()
def _choose(
    logits: Float[Tensor, "B V"], rows: list[_Row], request: Request
) -> tuple[list[int], list[float]]:
    """The next id of every row, and its log-probability under the model."""
    whole = logits.logsumexp(-1)  # over the ids that are banned, too: as `score` counts
    if request.banned:
        logits[:, sorted(request.banned)] = -torch.inf
    adjusted = logits
    if request.repetition_penalty != 1.0:
        adjusted = torch.stack(
            [
                penalise_repetition(
                    row_logits,
                    torch.tensor(row.tokens, device=logits.device),
                    request.repetition_penalty,
                )
                for row_logits, row in zip(logits, rows, strict=True)
            ]
        )
    ids = request.choose(adjusted)
    logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - whole
    return ids.tolist(), logprobs.tolist()


def _finished(row: _Row, id_: int, request: Request) -> StopReason | None:
    if id_ in request.stops:
        return "stop_token"
    if request.watch is not None and request.watch(row.index, id_):
        return "stop_string"
    if row.new >= request.max_new_tokens:
        return "length"
    return "context" if row.new >= row.room else None

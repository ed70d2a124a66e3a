"""A few tokens through the model: whether its answers end, and whether batches change them.

Axes: B batch rows, T positions, V vocabulary.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardor.arch.causal import CausalLM
from ardor.arch.layout import Packed
from ardor.bridge.foreign import Foreign
from ardor.errors import ArdorError
from ardor.generate.decode import Request, decode
from ardor.generate.text import Settings, chat_prompt, generate
from ardor.load import Model, load_model, tokenizer_of

SMALL = 512 << 20  # bytes of weights up to which it runs without being asked for
TOKENS = 48  # of an answer
QUESTIONS = ("Hello! Who are you?", "What is two plus two? Answer with one word.")
OPENINGS = ("The", "Once upon a time")


@dataclass(frozen=True)
class Answer:
    """One greedy continuation, and how it ended."""

    prompt: str
    text: str
    tokens: int
    stop_reason: str
    passed: str | None  # the first control token it wrote and went on after


@dataclass(frozen=True)
class Probe:
    """What was seen. Differences are the largest of logits, in units of the largest logit."""

    seconds: float
    bytes: int  # of the weights that were loaded
    compute: torch.dtype = torch.float32
    answers: tuple[Answer, ...] = ()
    packed: float = 0.0  # of a document behind another one, against alone
    batched: float = 0.0  # of a prompt beside a longer one, against alone: nats per token
    left_padded: float | None = (
        None  # as other programs run it, without position_ids; None: not theirs
    )
    finite: bool = True  # every logit, those of padding too
    largest: float = 0.0  # magnitude of an output of any module
    beyond: float = 0.0  # share of probability on ids that the tokenizer lacks
    failed: str | None = None  # why nothing was seen

    @property
    def tolerance(self) -> float:
        """What rounding alone may make of a difference."""
        return 1e-3 if self.compute == torch.float32 else 5e-2


def cost(size: int) -> str:
    """What a probe of weights of `size` bytes takes, for people."""
    tokens = TOKENS * len(QUESTIONS)
    return f"loads {size / 2**20:,.0f} MiB of weights and runs about {tokens} tokens through them"


def observe(path: Path, size: int, device: torch.device, *, trust_remote_code: bool) -> Probe:
    """Load the model and run it. What keeps it from running is told, not raised."""
    began = time.monotonic()
    try:
        model = load_model(path, device=device, trust_remote_code=trust_remote_code)
        return _seen(model, size, began)
    except ArdorError as error:
        return Probe(time.monotonic() - began, size, failed=str(error))


@torch.inference_mode()
def _seen(model: Model, size: int, began: float) -> Probe:
    decoder = model.decoder
    short, long = _documents(decoder.facts.vocab, min(decoder.facts.max_positions, 24))
    with _largest(decoder) as largest:
        alone = decoder.logits(decoder.hidden(_row(long, decoder)))
    together = decoder.hidden(_row([*short, *long], decoder), Packed(((len(short), len(long)),)))
    packed = _apart(decoder.logits(together[:, len(short) :]), alone)
    finite = bool(alone.isfinite().all())
    left = None
    if isinstance(decoder, Foreign):
        padded = _left_padded(decoder.foreign, long, len(short), decoder.device)
        finite = finite and bool(padded.isfinite().all())
        left = _apart(padded[:1, len(short) :].float(), alone)
    known = decoder.facts.vocab if model.tokenizer is None else model.tokenizer.vocab_rows
    beyond = float(alone.softmax(-1)[..., known:].sum(-1).mean())
    return Probe(
        seconds=time.monotonic() - began,
        bytes=size,
        compute=decoder.compute,
        answers=_answers(model) if finite and model.tokenizer is not None else (),
        packed=packed,
        batched=_batched(decoder, short, long) if finite else 0.0,
        left_padded=left,
        finite=finite,
        largest=largest[0],
        beyond=beyond,
    )


def _documents(vocab: int, positions: int) -> tuple[list[int], list[int]]:
    """Two texts of ids from all over the vocabulary, which fit the context together."""
    ids = [(i * 7919 + 13) % vocab for i in range(12)]
    cut = max(1, min(5, positions // 3))
    return ids[:cut], ids[cut : max(cut + 1, min(12, positions - cut))]


def _row(ids: Sequence[int], decoder: CausalLM) -> Tensor:
    return torch.tensor([ids], device=decoder.device)


def _apart(some: Tensor, others: Tensor) -> float:
    """The largest difference, as a share of the largest value; NaN counts as infinite."""
    scale = max(1.0, float(others.abs().max()))
    found = float((some - others).abs().max()) / scale
    return found if found == found else float("inf")


def _batched(decoder: CausalLM, short: list[int], long: list[int]) -> float:
    """How far a token's log-probability moves when another prompt is decoded beside it."""
    request = Request(max_new_tokens=4)
    beside: dict[int, list[tuple[int, float]]] = {0: [], 1: []}
    for token in decode(decoder, [short, long], request):
        beside[token.row].append((token.id, token.logprob))
    worst = 0.0
    for row, prompt in enumerate((short, long)):
        alone = [(token.id, token.logprob) for token in decode(decoder, [prompt], request)]
        for (id, logprob), (other, expected) in zip(beside[row], alone, strict=False):
            worst = max(worst, abs(logprob - expected))
            if id != other:  # a tie that rounding broke: what follows is another text
                break
    return worst


def _left_padded(foreign: nn.Module, ids: list[int], pads: int, device: torch.device) -> Tensor:
    """Logits as transformers gives them where a batch is padded on the left, with a mask alone."""
    whole = [(id + 1) % 7 for id in range(pads + len(ids))]
    tokens = torch.tensor([[0] * pads + ids, whole], device=device)
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    return foreign(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def _answers(model: Model) -> tuple[Answer, ...]:
    tokenizer = tokenizer_of(model)
    chats = model.template is not None
    found, settings = [], Settings(max_new_tokens=TOKENS, temperature=0.0)
    for text in QUESTIONS if chats else OPENINGS:
        try:
            asked = [{"role": "user", "content": text}]
            prompt = chat_prompt(model, asked) if chats else tokenizer.encode(text)
            (answer,) = generate(model, [prompt], settings)
        except ArdorError as error:  # a template that refuses it, a context too small
            found.append(Answer(text, "", 0, str(error), None))
            continue
        known = tokenizer.control - tokenizer.tags - model.stops.ids
        wrote = next((id for id in answer.tokens[:-1] if id in known), None)
        passed = None if wrote is None else tokenizer.token(wrote)
        found.append(Answer(text, answer.text, len(answer.tokens), answer.stop_reason, passed))
    return tuple(found)


@contextmanager
def _largest(decoder: nn.Module) -> Generator[list[float], None, None]:
    """The largest magnitude that any module gives meanwhile, as the one entry of a list."""
    seen = [0.0]

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            seen[0] = max(seen[0], float(output.abs().nan_to_num(0.0, float("inf")).max()))

    hooks: list[Callable[[], None]] = [
        module.register_forward_hook(look).remove for module in decoder.modules()
    ]
    try:
        yield seen
    finally:
        for remove in hooks:
            remove()

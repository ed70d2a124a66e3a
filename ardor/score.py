"""How probable a text is under a model.

Axes: B batch rows, T positions, D model width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ardor.arch.causal import CausalLM
from ardor.arch.experts import Routing
from ardor.arch.layout import Packed
from ardor.data.batches import Batch
from ardor.errors import ShapeError
from ardor.load import Model, tokenizer_of
from ardor.loss import IGNORE, LossSum, chunked_next_token_loss, chunked_token_logprobs

CHUNK = 256  # positions whose logits are held at a time


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the tokens of a text, each given those before it.

    The first token has none: nothing stands before it. (With a tokenizer that begins with BOS
    that is the BOS, and all of the text is scored.)
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, of tokens[1:]
    bytes: int  # of the text that was scored, in UTF-8

    @property
    def targets(self) -> int:
        return len(self.logprobs)

    @property
    def nats(self) -> float:
        return -math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per scored token."""
        return math.exp(self.nats / self.targets)

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode the text per byte of it: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def token_logprobs(decoder: CausalLM, tokens: Sequence[int]) -> list[float]:
    """log p(tokens[i] | tokens[:i]) for i = 1 .. len(tokens) - 1, in nats.

    Raises: ShapeError if there are fewer than two tokens or more than the model's context, or an id
    that the model lacks.
    """
    if not 2 <= len(tokens) <= decoder.facts.max_positions:
        raise ShapeError(
            f"{len(tokens)} tokens cannot be scored: at least 2 are needed, and the model's "
            f"context holds {decoder.facts.max_positions}; give a longer text or split it"
        )
    decoder.check_ids(tokens)
    row = torch.tensor([list(tokens)], device=decoder.device)
    hidden, wanted = decoder.hidden(row[:, :-1]), row[:, 1:]
    found = []
    for start in range(0, wanted.shape[1], CHUNK):
        piece = slice(start, start + CHUNK)
        logprobs = decoder.token_logits(hidden[:, piece]).log_softmax(-1)
        found.append(logprobs.gather(-1, wanted[:, piece, None])[0, :, 0])
    return torch.cat(found).tolist()


def document_loss(
    decoder: CausalLM,
    batch: Batch,
    routings: list[Routing] | None = None,
    *,
    share: float | None = None,
) -> LossSum:
    """Summed nats of a ragged row of documents; no position reads another document.

    `routings` takes what each layer's router decided, for a loss of its own. `share`, if it is
    known, is what they are multiplied with in the backward pass that follows: then a trained head
    has no second gradient beside that of earlier batches.
    """
    device = decoder.device
    tokens, layout = batch.tokens.to(device), Packed((batch.lengths,))
    hidden = decoder.hidden(tokens, layout, routings=routings)
    return chunked_next_token_loss(
        hidden,
        batch.targets.to(device),
        *decoder.head_parts(),
        known=decoder.tokens_known,
        share=share,
    )


class DocumentLogprobs(NamedTuple):
    sums: Float[Tensor, "documents"]  # nats, of the targets of each document together
    targets: Int[Tensor, "documents"]


def document_logprobs(
    decoder: CausalLM,
    batch: Batch,
    routings: list[Routing] | None = None,
    *,
    accumulate: bool = False,
) -> DocumentLogprobs:
    """The log-probability of each document's targets; every document has one at least.

    `routings` as in `document_loss`; with `accumulate`, only `backward` may follow, and a trained
    head has no second gradient either.
    """
    device = decoder.device
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)
    hidden = decoder.hidden(tokens, Packed((batch.lengths,)), routings=routings)
    found = chunked_token_logprobs(
        hidden,
        targets,
        *decoder.head_parts(),
        known=decoder.tokens_known,
        accumulate=accumulate,
    )
    marked = (batch.targets[0] != IGNORE).split(list(batch.lengths))
    counts = [int(part.sum()) for part in marked]
    # Not index_add: on a GPU it adds in another order each time.
    sums = torch.stack([part.sum() for part in found.split(counts)])
    return DocumentLogprobs(sums, torch.tensor(counts, device=device))


@torch.inference_mode()
def heldout_loss(decoder: CausalLM, batches: Iterable[Batch]) -> LossSum:
    """Summed nats and counted targets of a dataset, whatever its division into batches."""
    device = decoder.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    targets = torch.zeros((), dtype=torch.int64, device=device)
    decoder.eval()
    for batch in batches:
        found = document_loss(decoder, batch)
        nats, targets = nats + found.nats, targets + found.targets
    return LossSum(nats, targets)


def score_text(model: Model, text: str) -> Score:
    """How probable `text` is, as the model's own tokenizer cuts it.

    Raises: ShapeError if it has fewer than two tokens or more than the model's context.
    """
    tokenizer = tokenizer_of(model)
    tokens = tokenizer.encode(text)
    logprobs = token_logprobs(model.decoder, tokens)
    scored = tokenizer.decode(tokens[1:], skip_special=True)
    return Score(tuple(tokens), tuple(logprobs), len(scored.encode()))

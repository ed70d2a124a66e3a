"""More rows for the tables that hold one per token: the embedding, the head, and their like.

Axes: V rows that exist, n rows that are made, D width of a table.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.decoder import Decoder
from ardor.arch.linear import Linear
from ardor.errors import ConfigError

SPREAD = 1e-9  # of the rows' covariance: enough that no two new rows are equal
ROW_MULTIPLE = 64  # tables have a multiple of this many rows: matrix units like it
CHUNK = 8192  # rows that are expanded to float32 at a time


def rows_for(ids: int) -> int:
    """How many rows a table gets that must hold so many ids."""
    return -(-ids // ROW_MULTIPLE) * ROW_MULTIPLE


def with_rows(spec: specs.Decoder, rows: int) -> specs.Decoder:
    """`spec` with at least `rows` rows in every table of tokens."""
    most, inputs = max(rows, spec.vocab), spec.token_input
    inputs = None if inputs is None else replace(inputs, rows=max(most, inputs.rows))
    return replace(spec, vocab=most, token_input=inputs)


def grow_rows(
    decoder: Decoder, rows: int, *, known: int, fresh: Collection[int] = (), seed: int = 0
) -> None:
    """Give every table of tokens at least `rows` rows; the existing ones stay, bit for bit.

    New rows, and those of the `fresh` ids that exist already, are drawn around the mean of the
    first `known` with a billionth of their covariance: in float32, rounded once. A new token then
    takes at most one part in V + 1 of the probability before it is trained. A tied head stays
    tied. Never fewer rows than there are.

    Raises: ConfigError if a table is quantized or adapted.
    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    """
    spec, most = decoder.spec, max(rows, decoder.spec.vocab)
    made = sorted({*range(spec.vocab, most), *(id for id in fresh if id < spec.vocab)})
    if not made:
        return
    generator = torch.Generator().manual_seed(seed)
    # Every module is looked at before any is changed.
    for owner, name in [*_tables(decoder)]:
        table = owner.get_parameter(name)
        grown = _grown(table.detach(), most, made, known, generator)
        owner.register_parameter(name, nn.Parameter(grown, requires_grad=table.requires_grad))
        if isinstance(owner, Linear):
            owner.outputs = most
    decoder.spec = with_rows(spec, most)


def _tables(decoder: Decoder) -> Iterator[tuple[nn.Module, str]]:
    yield decoder.embed_tokens, "weight"
    if decoder.token_inputs is not None:
        yield decoder.token_inputs.embed, "weight"
    head = decoder.lm_head
    if head is None:
        return
    if not isinstance(head, Linear):
        raise ConfigError(
            f"the head is a {type(head).__name__}, to which no rows can be added; add tokens to "
            "the model as it was before it was quantized or adapted"
        )
    yield head, "weight"
    if head.bias is not None:
        yield head, "bias"


@torch.no_grad()
def _grown(
    table: Tensor, rows: int, made: list[int], known: int, generator: torch.Generator
) -> Tensor:
    """A copy of at least `rows` rows, those in `made` drawn; a bias counts as rows of width 1."""
    old = table.reshape(len(table), -1)
    whole = old.new_empty(max(rows, len(old)), old.shape[1])
    made = sorted({*made, *range(len(old), len(whole))})
    whole[: len(old)] = old
    whole[torch.tensor(made, device=old.device)] = _draws(
        old[: min(known, len(old))], len(made), generator
    ).to(old.dtype)
    return whole.reshape(len(whole), *table.shape[1:])


def _draws(
    known: Float[Tensor, "V D"], count: int, generator: torch.Generator
) -> Float[Tensor, "n D"]:
    """mean + sqrt(SPREAD / V) z (known - mean) with z standard normal: their covariance, scaled."""
    mean = torch.zeros(known.shape[1], dtype=torch.float64, device=known.device)
    for piece in known.split(CHUNK):
        mean += piece.double().sum(0)
    mean = (mean / len(known)).float()
    noise = torch.zeros(count, known.shape[1], device=known.device)
    for piece in known.split(CHUNK):
        z = torch.randn(count, len(piece), generator=generator).to(known.device)
        noise += z @ (piece.float() - mean)
    return mean + math.sqrt(SPREAD / len(known)) * noise


def untrained(decoder: Decoder, ids: Collection[int]) -> tuple[int, ...]:
    """Those of `ids` whose rows in the embedding nothing has trained: all zero, or its mean.

    Checkpoints keep rows in reserve so, and so do resized embeddings.
    """
    weight = decoder.embed_tokens.weight
    sizes = torch.stack([piece.float().norm(dim=1).mean() for piece in weight.split(CHUNK)])
    mean = torch.stack([piece.float().mean(0) for piece in weight.split(CHUNK)]).mean(0)
    typical = float(sizes.mean())
    found = []
    for id in sorted(ids):
        row = weight[id].float()
        near = float((row - mean).norm()) <= 0.01 * typical
        if near or float(row.abs().max()) <= 1e-16:
            found.append(id)
    return tuple(found)

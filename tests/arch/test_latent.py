"""Latent attention, whichever way it goes: its invariants need no reference."""

from dataclasses import replace

import pytest
import torch

from ardor.arch import spec as specs
from ardor.arch.cache import KVCache
from ardor.arch.latent import LatentAttention
from ardor.arch.layout import Cached, Packed

from .test_decoder import V, llama, random_decoder


def latent(**changes) -> specs.LatentAttention:
    plain = specs.LatentAttention(
        heads=3,
        query_rank=10,
        kv_rank=8,
        plain_width=6,
        value_width=5,
        scale=0.3,
        rope=specs.Rope(theta=1e4, rotated=4, pairing="neighbours"),
        norm=specs.Norm(eps=1e-6),
    )
    return replace(plain, **changes)


def decoder(attn: str = "sdpa", **changes):
    layer = replace(llama().layers[0], mixer=latent(**changes))
    return random_decoder(llama(layers=(layer,) * 2), attn)


EVERY = pytest.mark.parametrize("changes", [{}, {"query_rank": None}, {"bias": True}], ids=str)
tokens = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(0))


@EVERY
@torch.no_grad()
def test_fused_attention_is_the_reference(changes):
    fused, reference = (decoder(attn, **changes).hidden(tokens) for attn in ("sdpa", "eager"))
    torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_cached_steps_of_any_length_are_one_pass(changes, attn):
    model = decoder(attn, **changes)
    cache = KVCache(model.spec, rows=2, capacity=12, dtype=torch.float32)
    parts = []
    for part in tokens.split([4, 1, 1, 3, 1, 2], dim=1):
        parts.append(model.hidden(part, cache=cache))
        cache.advance(part.shape[1])
    whole = model.hidden(tokens)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_unequal_past_read_their_own():
    model = decoder()
    cache = KVCache(model.spec, rows=2, capacity=12, dtype=torch.float32)
    for row, length in enumerate((7, 4)):
        alone = cache.row(row)
        model.hidden(tokens[row : row + 1, :length], cache=alone)
        cache.past[row] = length
    found = model.hidden(tokens[:, 8:9], cache=cache)
    for row, length in enumerate((7, 4)):
        text = torch.cat([tokens[row, :length], tokens[row, 8:9]])[None]
        torch.testing.assert_close(found[row], model.hidden(text)[0, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_documents_are_separate_ones():
    model = decoder()
    packed = model.hidden(tokens, Packed(((5, 7), (1, 11))))
    pieces = [tokens[:1, :5], tokens[:1, 5:], tokens[1:, :1], tokens[1:, 1:]]
    alone = torch.cat([model.hidden(piece) for piece in pieces], 1).view_as(packed)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("past", [(9, 9), (9, 2)])
def test_queries_taken_to_the_latents_attend_as_expanded_keys_do(attn, new, past):
    generator = torch.Generator().manual_seed(1)
    layer = LatentAttention(24, latent(), attn).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    q = torch.randn(2, 3, new, 10, generator=generator, dtype=torch.float64)
    shared = torch.randn(2, 1, 9 + new, 12, generator=generator, dtype=torch.float64)
    layout = Cached(past, new)
    expanded = layer.attend_expanded(q, shared, layout)
    torch.testing.assert_close(layer.attend_latents(q, shared, layout), expanded)


@torch.no_grad()
def test_decoding_expands_nothing_of_the_past():
    model, read = decoder(), []
    for layer in model.layers:
        layer.mixer.kv_up_proj.register_forward_hook(lambda _, given, __: read.append(given))
    cache = KVCache(model.spec, rows=2, capacity=12, dtype=torch.float32)
    model.hidden(tokens[:, :11], cache=cache)
    assert len(read) == 2  # the prompt is expanded, once in each layer
    cache.advance(11)
    model.hidden(tokens[:, 11:], cache=cache)
    assert len(read) == 2

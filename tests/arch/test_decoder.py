"""Invariants of the decoder that need no reference."""

from dataclasses import replace

import pytest
import torch

from ardor.arch import spec as specs
from ardor.arch.attention import backend_for
from ardor.arch.cache import KVCache
from ardor.arch.decoder import Decoder
from ardor.arch.init import initialise
from ardor.arch.layout import Packed
from ardor.errors import ConfigError, ShapeError

V = 61


def llama(**changes) -> specs.Decoder:
    attention = specs.Attention(
        heads=6, kv_heads=2, head_width=8, scale=8**-0.5, rope=specs.Rope(theta=1e4, rotated=8)
    )
    layer = specs.Layer(
        mixer=attention, ffn=specs.Mlp(width=40, act="silu"), norm=specs.Norm(eps=1e-6)
    )
    plain = specs.Decoder(
        vocab=V,
        width=24,
        layers=(layer,) * 2,
        norm=specs.Norm(eps=1e-6),
        tied=False,
        max_positions=64,
    )
    return replace(plain, **changes)


def gpt2() -> specs.Decoder:
    norm = specs.Norm(kind="layer", eps=1e-5, bias=True)
    attention = specs.Attention(
        heads=3,
        kv_heads=3,
        head_width=8,
        scale=8**-0.5,
        rope=None,
        qkv_bias=True,
        out_bias=True,
    )
    mlp = specs.Mlp(width=96, act="gelu_tanh", gated=False, bias=True)
    return specs.Decoder(
        vocab=V,
        width=24,
        layers=(specs.Layer(mixer=attention, ffn=mlp, norm=norm),) * 2,
        norm=norm,
        tied=True,
        max_positions=64,
        learned_positions=True,
    )


def gemma4() -> specs.Decoder:
    """Two kinds of layers; the last two read the keys and values of the first two."""
    norm = specs.Norm(eps=1e-2, late_cast=True)  # a small one makes noise of small vectors
    full = specs.Attention(
        heads=4,
        kv_heads=1,
        head_width=16,
        scale=0.2,
        rope=specs.Rope(theta=50.0, rotated=16, scaling=specs.ProportionalScaling(turning=2)),
        qk_norm=specs.QKNorm(norm=norm),
        value_norm=replace(norm, weight="none"),
        values_from_keys=True,
    )
    local = replace(full, head_width=8, rope=specs.Rope(theta=10.0, rotated=8), window=3)
    local = replace(local, values_from_keys=False)
    mlp = specs.Mlp(width=40, act="gelu_tanh")
    router = specs.Router(per_token=2, norm=norm, read_scale=0.2, expert_scale=True)
    experts = specs.Experts(count=4, expert=mlp, router=router, shared=mlp, norm=norm)
    mixers = (local, full, replace(local, kv_layer=0), replace(full, kv_layer=1))
    layers = tuple(
        specs.Layer(mixer=mixer, ffn=ffn, norm=norm, placement="sandwich", scalar=True)
        for mixer, ffn in zip(mixers, (mlp, experts, mlp, experts), strict=True)
    )
    inputs = specs.TokenInput(rows=V, width=5, act="gelu_tanh", norm=norm)
    return llama(layers=layers, norm=norm, tied=True, token_input=inputs)


def random_decoder(spec: specs.Decoder, attn: str = "sdpa", scale: float = 8.0) -> Decoder:
    """Weights far larger than a fresh model's: attention is peaked, so that errors show."""
    decoder = Decoder(spec, attn=attn)
    initialise(decoder, torch.Generator().manual_seed(0), std=0.02 * scale)
    return decoder


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


both = pytest.mark.parametrize("spec", [llama(), gpt2(), gemma4()], ids=["llama", "gpt2", "gemma4"])
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])


@both
@backends
@torch.no_grad()
def test_the_future_cannot_change_the_past(spec, attn):
    decoder = random_decoder(spec, attn)
    one = ids(2, 12)
    other = one.clone()
    other[:, 7:] = ids(2, 5, seed=1)
    a, b = (decoder.logits(decoder.hidden(x)) for x in (one, other))
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=1e-5, atol=1e-5)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 0.1  # the change could be seen at all


@both
@torch.no_grad()
def test_backends_agree_with_documents_inside_rows(spec):
    tokens, layout = ids(2, 12), Packed(((5, 1, 6), (4, 4, 4)))
    reference, fast = (
        random_decoder(spec, attn).hidden(tokens, layout) for attn in ("eager", "sdpa")
    )
    torch.testing.assert_close(fast, reference, rtol=1e-5, atol=1e-5)


@both
@backends
def test_packed_documents_equal_separate_ones_in_value_and_gradient(spec, attn):
    decoder = random_decoder(spec, attn)
    lengths, tokens = (5, 1, 7, 7, 3), ids(1, 23)
    packed = decoder.hidden(tokens, Packed((lengths,)))
    separate = torch.cat([decoder.hidden(t) for t in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    whole = decoder.hidden(tokens)
    assert (packed - whole)[:, 5:].abs().max() > 0.1  # borders matter to this model

    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((h * weights).sum(), list(decoder.layers.parameters()))
        for h in (packed, separate)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@both
@backends
@torch.no_grad()
def test_cached_equals_uncached_whatever_the_steps(spec, attn):
    decoder, tokens = random_decoder(spec, attn), ids(2, 12)
    whole = decoder.hidden(tokens)
    cache = KVCache(spec, rows=2, capacity=12, dtype=torch.float32)
    parts = []
    for piece in tokens.split([4, 1, 3, 1, 1, 2], dim=1):
        parts.append(decoder.hidden(piece, cache=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@both
@backends
@torch.no_grad()
def test_rows_of_unequal_length_decode_as_if_alone(spec, attn):
    decoder = random_decoder(spec, attn)
    prompts, following = [ids(1, n, seed=n) for n in (3, 9, 5)], ids(3, 4, seed=99)
    cache = KVCache(spec, rows=3, capacity=16, dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        decoder.hidden(prompt, cache=cache.row(row))
        cache.past[row] = prompt.shape[1]
    together = []
    for step in range(4):
        together.append(decoder.hidden(following[:, step : step + 1], cache=cache))
        cache.advance(1)
    together = torch.cat(together, 1)
    for row, prompt in enumerate(prompts):
        alone = decoder.hidden(torch.cat([prompt, following[row : row + 1]], 1))[:, -4:]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    cache.keep([2])  # the others finished: what is left goes on unchanged
    left = decoder.hidden(ids(1, 1, seed=7), cache=cache)
    full = torch.cat([prompts[2], following[2:], ids(1, 1, seed=7)], 1)
    torch.testing.assert_close(left, decoder.hidden(full)[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_holds_shared_keys_and_values_once():
    spec = gemma4()
    cache = KVCache(spec, rows=2, capacity=10, dtype=torch.float32)
    decoder = random_decoder(spec)
    decoder.hidden(ids(2, 7), cache=cache)
    cache.advance(7)
    held = [kv.numel() for kv in cache._layers]
    assert held == [2 * 2 * 10 * 8, 2 * 2 * 10 * 16, 0, 0]
    cache.keep([1])
    one = cache.row(0)
    found = decoder.hidden(ids(1, 2, seed=1), cache=one)
    again = torch.cat([ids(2, 7)[1:], ids(1, 2, seed=1)], 1)
    torch.testing.assert_close(found, decoder.hidden(again)[:, -2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layers_scalar_and_a_tokens_vector_act():
    decoder, tokens = random_decoder(gemma4()), ids(1, 6)
    before = decoder.hidden(tokens)
    decoder.layers[0].scalar.fill_(0.5)
    halved = decoder.hidden(tokens)
    assert (halved - before).abs().max() > 0.05
    decoder.token_inputs.embed.weight[tokens[0, 3]] += 1.0
    changed = (decoder.hidden(tokens) - halved).abs().amax((0, 2))
    assert changed[tokens[0] == tokens[0, 3]].min() > 0.05
    assert changed[:3].max() < 1e-5  # what comes before does not see it


@torch.no_grad()
def test_masters_in_float32_compute_in_bfloat16():
    decoder = random_decoder(llama(), scale=1.0)
    exact = decoder.logits(decoder.hidden(ids(2, 12)))
    decoder.compute = torch.bfloat16
    assert decoder.hidden(ids(2, 12)).dtype == torch.bfloat16
    logits = decoder.logits(decoder.hidden(ids(2, 12)))
    assert logits.dtype == torch.float32
    # 8 bits of mantissa through two layers: a few parts in a hundred of the logits' size.
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_the_scale_of_embeddings_is_rounded_where_the_spec_says_so():
    """0.3 in bfloat16 is 0.30078125: as Gemma was trained, and as Granite was not."""
    for rounded, scale in ((True, 0.30078125), (False, 0.3)):
        spec = llama(embed_scale=0.3, embed_scale_rounded=rounded)
        decoder = random_decoder(spec).bfloat16()
        ids = torch.arange(3)[None]
        found = decoder._embedded(ids, ids, 3)
        torch.testing.assert_close(found, decoder.embed_tokens(ids).float() * scale)


def test_learned_positions_that_run_out_are_refused():
    with pytest.raises(ShapeError, match="65 positions, but this model has learned only 64"):
        random_decoder(gpt2()).hidden(ids(1, 65))


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"layout of \(1, 5\) does not fit tokens \(1, 6\)"):
        random_decoder(llama()).hidden(ids(1, 6), Packed(((2, 3),)))
    with pytest.raises(ShapeError, match="do not make rows of one length"):
        Packed(((2, 3), (4,)))


def test_a_full_cache_is_refused():
    cache = KVCache(llama(), rows=1, capacity=4, dtype=torch.float32)
    cache.advance(4)
    with pytest.raises(ShapeError, match="exceed the cache's capacity of 4"):
        random_decoder(llama()).hidden(ids(1, 1), cache=cache)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'flash' is not one of eager, sdpa, flex"):
        backend_for("flash", torch.device("cpu"))

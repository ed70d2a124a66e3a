"""What holds of every decoder that a spec can describe, shown on random ones."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ardor.arch.cache import KVCache
from ardor.arch.decoder import Decoder
from ardor.arch.layout import Packed
from ardor.arch.spec import (
    Attention,
    Experts,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Mlp,
    Norm,
    ProportionalScaling,
    QKNorm,
    Rope,
    Router,
    TokenInput,
    YarnScaling,
)
from ardor.arch.spec import Decoder as Spec

# beartype, which checks the specs as they are drawn, looks at a random item of each tuple.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

V, T = 29, 10
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64: only the order of sums differs

norms = st.builds(
    Norm,
    kind=st.sampled_from(["rms", "layer"]),
    eps=st.sampled_from([1e-6, 1e-2]),
    weight=st.sampled_from(["scale", "one_plus", "none"]),
    bias=st.just(False),
    late_cast=st.booleans(),
)
scalings = st.sampled_from(
    [
        None,
        LinearScaling(factor=3.0),
        ProportionalScaling(turning=1, factor=2.0),
        YarnScaling(factor=2.0, original_positions=4, attention_factor=0.8),
        Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=6),
    ]
)


@st.composite
def attentions(draw) -> Attention:
    kv_heads, group, d = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        2 * draw(st.integers(1, 3)),
    )
    heads = kv_heads * group
    position = draw(st.sampled_from(["rope", "alibi", "none"]))
    rope = Rope(
        theta=20.0,
        rotated=draw(st.sampled_from(range(2, d + 1, 2))),
        pairing=draw(st.sampled_from(["halves", "neighbours"])),
        scaling=draw(scalings),
    )
    qk = st.builds(
        QKNorm,
        norm=norms.filter(lambda norm: norm.weight != "none"),
        over=st.sampled_from(["head", "heads", "width"]),
        after_rope=st.booleans(),
    )
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_width=d,
        scale=draw(st.sampled_from([0.3, 1.0])),
        rope=rope if position == "rope" else None,
        window=draw(st.sampled_from([None, 3, 20])),
        chunk=draw(st.sampled_from([None, None, 4])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        alibi=tuple(0.3 * i for i in range(heads)) if position == "alibi" else None,
        qk_norm=draw(st.none() | qk),
        clip=draw(st.sampled_from([None, 0.5])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        value_norm=draw(st.none() | norms),
        values_from_keys=draw(st.booleans()),
    )


mlps = st.builds(
    Mlp,
    width=st.integers(1, 5),
    act=st.sampled_from(["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]),
    gated=st.booleans(),
    bias=st.booleans(),
    limit=st.sampled_from([None, 0.7]),
    shift=st.sampled_from([0.0, 1.0]),
)
routers = st.builds(
    Router,
    per_token=st.integers(1, 2),
    score=st.sampled_from(["softmax", "sigmoid", "chosen", "sparsemixer"]),
    renormalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    bias=st.booleans(),
    correction=st.booleans(),
    groups=st.sampled_from([1, 2]),
    group_score=st.sampled_from(["max", "top2"]),
    jitter=st.just(0.1),
    norm=st.none() | norms,
    read_scale=st.sampled_from([1.0, 0.4]),
    expert_scale=st.booleans(),
    scales_input=st.booleans(),
)
experts = st.builds(
    Experts,
    count=st.just(4),
    expert=mlps,
    router=routers,
    shared=st.none() | mlps,
    shared_gated=st.just(False),
    norm=st.none() | norms,
)
layers = st.builds(
    Layer,
    mixer=attentions(),
    ffn=mlps | experts,
    norm=norms,
    placement=st.sampled_from(["pre", "post", "sandwich", "after", "parallel", "parallel_two"]),
    residual_scale=st.sampled_from([1.0, 0.5]),
    residual_normed=st.booleans(),
    scalar=st.booleans(),
)


@st.composite
def stacks(draw) -> tuple[Layer, ...]:
    """Layers, of which some read the keys and values of an earlier one of the same shape."""
    found: list[Layer] = []
    for layer in draw(st.lists(layers, min_size=1, max_size=4)):
        own = [i for i, before in enumerate(found) if before.mixer.kv_layer is None]
        source = draw(st.none() | st.sampled_from(own)) if own else None
        if source is not None:
            mixer, there = layer.mixer, found[source].mixer
            group = mixer.heads // mixer.kv_heads
            mixer = replace(
                there, heads=there.kv_heads * group, window=mixer.window, kv_layer=source
            )
            mixer = replace(mixer, alibi=mixer.alibi and tuple(0.3 * i for i in range(mixer.heads)))
            layer = replace(layer, mixer=mixer)
        found.append(layer)
    return tuple(found)


specs = st.builds(
    Spec,
    vocab=st.just(V),
    width=st.just(6),
    layers=stacks(),
    norm=st.none() | norms,
    tied=st.booleans(),
    max_positions=st.just(T),
    learned_positions=st.booleans(),
    position_offset=st.sampled_from([0, 2]),
    embed_width=st.sampled_from([None, 4]),
    embed_scale=st.sampled_from([1.0, 2.0]),
    embed_norm=st.none() | norms,
    token_input=st.none()
    | st.builds(
        TokenInput,
        rows=st.just(V),
        width=st.integers(1, 3),
        act=st.sampled_from(["silu", "gelu_tanh"]),
        norm=norms,
    ),
    logit_scale=st.sampled_from([1.0, 0.5]),
    logit_softcap=st.sampled_from([None, 3.0]),
)


@torch.no_grad()
def decoder_of(spec: Spec, seed: int) -> Decoder:
    decoder = Decoder(spec, compute=torch.float64).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        tensor.normal_(0, 0.7, generator=generator)
    return decoder


def logits(decoder: Decoder, ids: torch.Tensor, layout: Packed | None = None) -> torch.Tensor:
    return decoder.head(decoder.hidden(ids, layout))


def some_ids() -> torch.Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(3))


seeds = st.integers(0, 9)
# What a run tries does not depend on chance. A failure is shown as it was found: to make it
# smaller would take minutes.
many = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def test_what_is_drawn_holds_layers_that_share_and_vectors_of_tokens():
    """The probes below try what they are there for."""
    shared = [False, False]

    @many
    @given(specs)
    def look(spec):
        shared[0] |= any(layer.mixer.kv_layer is not None for layer in spec.layers)
        shared[1] |= spec.token_input is not None

    look()
    assert all(shared)


@many
@given(specs, seeds, st.integers(1, T - 1))
@pytest.mark.sweep
def test_later_tokens_cannot_change_earlier_logits(spec, seed, border):
    decoder, ids = decoder_of(spec, seed), some_ids()
    changed = ids.clone()
    changed[:, border:] = (changed[:, border:] + 1) % V
    before, after = logits(decoder, ids), logits(decoder, changed)
    torch.testing.assert_close(before[:, :border], after[:, :border], **CLOSE)
    assert not torch.equal(before[:, border], after[:, border])  # the probe can see a change


@many
@given(specs, seeds, st.integers(1, T - 1))
@pytest.mark.sweep
def test_a_cache_changes_nothing(spec, seed, border):
    decoder, ids = decoder_of(spec, seed), some_ids()
    cache = KVCache(decoder.spec, rows=2, capacity=T, dtype=torch.float64)
    found = []
    for piece in (ids[:, :border], *ids[:, border:].split(1, dim=1)):
        found.append(decoder.head(decoder.hidden(piece, cache=cache)))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(found, 1), logits(decoder, ids), **CLOSE)


@many
@given(specs, seeds, st.integers(1, T - 1), st.integers(1, T - 1))
@pytest.mark.sweep
def test_packed_documents_are_separate_ones(spec, seed, first, second):
    decoder, ids = decoder_of(spec, seed), some_ids()
    borders = (first, second)
    packed = logits(decoder, ids, Packed(tuple((b, T - b) for b in borders)))
    for row, border in enumerate(borders):
        for piece in (slice(0, border), slice(border, T)):
            alone = logits(decoder, ids[row : row + 1, piece])
            torch.testing.assert_close(packed[row : row + 1, piece], alone, **CLOSE)

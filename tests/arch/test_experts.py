"""Each token is read by the experts that a small reference chooses, and by no other.

Axes: N tokens, D model width, E experts, k experts per token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from ardor.arch import spec as specs
from ardor.arch.experts import Experts, Router, Routing, load_balance
from ardor.arch.mlp import ACTIVATIONS

N, D, F, E = 17, 6, 5, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXPERT = specs.Mlp(width=F, act="silu")


def random(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def tokens(seed: int = 1, count: int = N) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def one_by_one(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The reference: every token through every expert, times a weight that is mostly zero."""
    spec, maps = experts.spec, experts.experts
    weights = torch.zeros(len(x), spec.count).scatter(1, routing.chosen, routing.weights)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert in range(spec.count):
            weight, read = weights[token, expert], x[token]
            if spec.router.scales_input:
                read, weight = read * weight, (weight != 0).float()
            up = maps.up_proj.weight[expert] @ read
            if maps.up_proj.bias is not None:
                up = up + maps.up_proj.bias[expert]
            inner = ACTIVATIONS[spec.expert.act](up)
            if maps.gate_proj is not None:
                gate = maps.gate_proj.weight[expert] @ read
                if maps.gate_proj.bias is not None:
                    gate = gate + maps.gate_proj.bias[expert]
                inner = ACTIVATIONS[spec.expert.act](gate) * up
            made = maps.down_proj.weight[expert] @ inner
            if maps.down_proj.bias is not None:
                made = made + maps.down_proj.bias[expert]
            out[token] = out[token] + weight * made
        if experts.shared is not None:
            beside = experts.shared(x[token])
            if experts.shared_gate is not None:
                beside = beside * experts.shared_gate(x[token]).sigmoid()
            out[token] = out[token] + beside
    return out


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 6),
    per_token=st.integers(1, 3),
    tokens_count=st.integers(1, 9),
    gated=st.booleans(),
    bias=st.booleans(),
    scales_input=st.booleans(),
    shared=st.sampled_from(["no", "plain", "gated"]),
)
def test_tokens_grouped_by_expert_get_what_each_gets_alone(
    count, per_token, tokens_count, gated, bias, scales_input, shared
):
    spec = specs.Experts(
        count=count,
        expert=specs.Mlp(width=F, act="relu", gated=gated, bias=bias),
        router=specs.Router(per_token=min(per_token, count), scales_input=scales_input),
        shared=None if shared == "no" else EXPERT,
        shared_gated=shared == "gated",
    )
    experts, x = random(Experts(D, spec)), tokens(count=tokens_count)
    routings: list[Routing] = []
    found = experts(x[None], routings)[0]
    torch.testing.assert_close(found, one_by_one(experts, x, routings[0]), rtol=1e-4, atol=1e-4)


def routed(spec: specs.Router, x: Tensor) -> tuple[Routing, Tensor]:
    """What the router decides, and its plain scores of all experts."""
    router = random(Router(D, E, spec))
    logits = x @ router.weight.T
    return router(x), logits if router.bias is None else logits + router.bias


def dense(routing: Routing) -> Tensor:
    """Each token's weight of each expert, (N, E)."""
    return torch.zeros(len(routing.weights), E).scatter(1, routing.chosen, routing.weights)


def best(scores: Tensor, k: int) -> Tensor:
    """Whether each score is among the k largest of its row."""
    return scores >= scores.sort(-1, descending=True).values[:, k - 1 : k]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_router_keeps_the_scores_of_the_best(score, bias, renormalise):
    spec = specs.Router(per_token=3, score=score, bias=bias, renormalise=renormalise, scale=1.5)
    routing, logits = routed(spec, tokens())
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    kept = torch.where(best(logits, 3), scores, 0.0)
    if renormalise:
        kept = kept / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(dense(routing), 1.5 * kept, **CLOSE)
    torch.testing.assert_close(routing.scores, scores, **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
def test_a_softmax_over_the_chosen_is_one_over_all_renormalised(bias):
    x = tokens()
    chosen, logits = routed(specs.Router(per_token=2, score="chosen", bias=bias), x)
    masked = logits.masked_fill(~best(logits, 2), -torch.inf)
    torch.testing.assert_close(dense(chosen), masked.softmax(-1), **CLOSE)
    other, _ = routed(specs.Router(per_token=2, renormalise=True, bias=bias), x)
    torch.testing.assert_close(dense(chosen), dense(other), **CLOSE)


def test_a_correction_changes_the_choice_and_not_the_weights():
    plain, logits = routed(specs.Router(per_token=2, score="sigmoid"), tokens())
    spec = specs.Router(per_token=2, score="sigmoid", correction=True)
    router = random(Router(D, E, spec))
    routing = router(tokens())
    scores = logits.sigmoid()
    kept = torch.where(best(scores + router.correction, 2), scores, 0.0)
    torch.testing.assert_close(dense(routing), kept, **CLOSE)
    assert not torch.equal(dense(routing), dense(plain))  # the probe can fail


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_experts_are_chosen_within_the_best_groups(group_score):
    spec = specs.Router(per_token=3, groups=4, kept_groups=2, group_score=group_score)
    routing, logits = routed(spec, tokens())
    scores = logits.softmax(-1)
    for token, row in enumerate(scores.tolist()):
        pairs = [sorted(row[g : g + 2], reverse=True) for g in range(0, E, 2)]
        rank = [p[0] if group_score == "max" else sum(p) for p in pairs]
        kept = sorted(range(4), key=rank.__getitem__)[-2:]
        allowed = [e for e in range(E) if e // 2 in kept]
        wanted = sorted(allowed, key=row.__getitem__)[-3:]
        assert sorted(routing.chosen[token].tolist()) == sorted(wanted)
    free, _ = routed(specs.Router(per_token=3), tokens())
    assert not torch.equal(dense(routing), dense(free))  # groups matter


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_sparsemixer_is_that_of_transformers_without_noise(jitter):
    spec = specs.Router(per_token=2, score="sparsemixer", jitter=jitter)
    routing, logits = routed(spec, tokens(count=200))
    weights, chosen = sparsemixer(logits, jitter_eps=jitter, training=False)
    assert torch.equal(routing.chosen, chosen)
    torch.testing.assert_close(routing.weights, weights, **CLOSE)
    assert (weights < 0.999).any() and (weights > 0.999).any()  # both near and far rivals


@pytest.mark.parametrize("layers", [1, 3])
def test_the_load_balancing_loss_is_that_of_transformers(layers):
    found = [routed(specs.Router(per_token=2), tokens(seed)) for seed in range(layers)]
    expected = load_balancing_loss_func(tuple(logits for _, logits in found), E, top_k=2)
    torch.testing.assert_close(load_balance([routing for routing, _ in found]), expected, **CLOSE)


def test_the_load_balancing_loss_is_least_where_experts_are_chosen_evenly():
    chosen = torch.arange(2 * E).remainder(E).view(-1, 2)  # (E, 2)
    even = Routing(torch.full((E, 2), 0.5), chosen, torch.full((E, E), 1 / E))
    torch.testing.assert_close(load_balance([even]), torch.tensor(2.0))
    alone = torch.zeros(E, 2, dtype=torch.long)
    uneven = Routing(even.weights, alone, torch.eye(E)[:1].expand(E, E))
    assert load_balance([uneven]) > 2.0

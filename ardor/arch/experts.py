"""A feed-forward of many experts, of which each token is read by a few.

Axes: N tokens, D model width, F width of an expert, E experts, k experts per token.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.linear import Linear
from ardor.arch.mlp import Fused, Mlp, activated, fused
from ardor.arch.norm import norm
from ardor.kernels.linear import linear
from ardor.kernels.mlp import Routes


class Routing(NamedTuple):
    """What a router decided; `scores` are its probabilities of all experts, for `load_balance`."""

    weights: Float[Tensor, "N k"]  # float32
    chosen: Int[Tensor, "N k"]
    scores: Float[Tensor, "N E"]


class Router(nn.Module):
    """Which experts read a token, and how much each counts."""

    def __init__(self, width: int, count: int, spec: specs.Router):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(count, width))
        self.bias = nn.Parameter(torch.empty(count)) if spec.bias else None
        self.correction = nn.Parameter(torch.empty(count)) if spec.correction else None
        self.norm = None if spec.norm is None else norm(width, spec.norm)
        self.expert_scale = nn.Parameter(torch.empty(count)) if spec.expert_scale else None

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """Scores are at least float32; wide and sigmoid routers multiply in it too (DeepSeek)."""
        spec, work = self.spec, torch.promote_types(x.dtype, torch.float32)
        if self.norm is not None:
            x = self.norm(x)
        if spec.read_scale != 1.0:
            x = x * spec.read_scale
        wide = x.to(work) if spec.wide or spec.score == "sigmoid" else x
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        logits = linear(wide, self.weight.to(wide.dtype), bias).to(work)
        if spec.score == "sparsemixer":
            return self._sparsemixer(logits)
        if spec.score == "chosen":
            best, chosen = logits.topk(spec.per_token, -1)
            return Routing(best.softmax(-1), chosen, logits.softmax(-1))
        scores = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
        ranked = scores if self.correction is None else scores + self.correction.to(work)
        if spec.groups > 1:
            ranked = self._within_groups(ranked)
        chosen = ranked.topk(spec.per_token, -1).indices
        weights = scores.gather(-1, chosen)
        if spec.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.to(work)[chosen]
        return Routing(weights * spec.scale, chosen, scores)

    def _within_groups(self, ranked: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Least outside the best groups. Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
        spec = self.spec
        grouped = ranked.unflatten(-1, (spec.groups, -1))  # (N, groups, E / groups)
        best = grouped.topk(2 if spec.group_score == "top2" else 1, -1).values.sum(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(spec.kept_groups, -1).indices, 1.0)
        return grouped.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)

    def _sparsemixer(self, logits: Float[Tensor, "N E"]) -> Routing:
        """The best expert, then the best of the rest; those far from the best do not count.

        Chosen without noise, in training too. Source: Liu et al. 2024, arXiv:2409.12136.
        """
        left, weights, chosen = logits, [], []
        for _ in range(self.spec.per_token):
            best, index = left.max(-1, keepdim=True)
            distance = (best - logits) / logits.abs().clamp(min=best)
            near = left.masked_fill(distance > 2 * self.spec.jitter, -torch.inf)
            weights.append(near.softmax(-1).gather(-1, index))
            chosen.append(index)
            left = left.scatter(-1, index, -torch.inf)
        return Routing(torch.cat(weights, -1), torch.cat(chosen, -1), logits.softmax(-1))


class ExpertLinear(nn.Module):
    """The same linear map of every expert, one above the other."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool):
        super().__init__()
        self.count, self.inputs, self.outputs = count, inputs, outputs
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(count, outputs)) if bias else None

    def of(self, expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        return linear(x, self.weight[expert].to(x.dtype), bias)


class ExpertMlps(nn.Module):
    """As many feed-forwards of one shape as there are experts."""

    def __init__(self, width: int, count: int, spec: specs.Mlp):
        super().__init__()
        self.spec = spec
        bias = spec.bias
        self.gate_proj = ExpertLinear(count, width, spec.width, bias=bias) if spec.gated else None
        self.up_proj = ExpertLinear(count, width, spec.width, bias=bias)
        self.down_proj = ExpertLinear(count, spec.width, width, bias=bias)

    def at_once(self, x: Float[Tensor, "N D"]) -> Fused | None:
        """Every expert over its rows of x as one compiled function of `Routes`, if it can be."""
        return fused(self.spec, x, (self.gate_proj, self.up_proj, self.down_proj), ExpertLinear)

    def of(self, expert: int, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        gate = None if self.gate_proj is None else self.gate_proj.of(expert, x)
        return self.down_proj.of(expert, activated(self.spec, gate, self.up_proj.of(expert, x)))


class Experts(nn.Module):
    """The weighted sum of the chosen experts, and of what every token reads beside them.

    Tokens are sorted by expert, so that each expert that is chosen at all is one product; the
    others cost nothing.
    """

    def __init__(self, width: int, spec: specs.Experts):
        super().__init__()
        self.spec = spec
        self.router = Router(width, spec.count, spec.router)
        self.experts = ExpertMlps(width, spec.count, spec.expert)
        self.shared = None if spec.shared is None else Mlp(width, spec.shared)
        self.shared_gate = Linear(width, 1) if spec.shared_gated else None

        def norm_if(wanted: bool) -> nn.Module | None:
            return norm(width, spec.norm) if wanted and spec.norm is not None else None

        self.in_norm, self.out_norm = norm_if(True), norm_if(True)
        self.shared_in_norm = norm_if(spec.shared is not None)
        self.shared_out_norm = norm_if(spec.shared is not None)

    def forward(
        self, x: Float[Tensor, "B T D"], routings: list[Routing] | None = None
    ) -> Float[Tensor, "B T D"]:
        rows = x.flatten(0, 1)
        routing = self.router(rows)
        if routings is not None:
            routings.append(routing)
        read = rows if self.in_norm is None else self.in_norm(rows)
        out = self._routed(read, routing)
        if self.out_norm is not None:
            out = self.out_norm(out)
        if self.shared is not None:
            out = out + self._beside(rows)
        return out.unflatten(0, x.shape[:2])

    def _beside(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What the expert gives that every token reads."""
        assert self.shared is not None
        made = self.shared(rows if self.shared_in_norm is None else self.shared_in_norm(rows))
        if self.shared_out_norm is not None:
            made = self.shared_out_norm(made)
        return made if self.shared_gate is None else made * self.shared_gate(rows).sigmoid()

    def _routed(self, rows: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        if len(rows) == 1:  # nothing to sort, and little to gain from anything but the products
            return self._of_one(rows, routing)
        router = self.spec.router
        flat = routing.chosen.flatten()  # (N * k,)
        order = flat.argsort(stable=True)
        tokens = order // router.per_token
        weights = routing.weights.flatten()[order]
        counts = torch.bincount(flat, minlength=self.spec.count).tolist()
        at_once = None if router.scales_input else self.experts.at_once(rows)
        if at_once is not None:
            return at_once(Routes(tokens, weights, counts))
        share = weights[:, None].to(rows.dtype)
        read = rows[tokens] * share if router.scales_input else rows[tokens]
        parts = enumerate(read.split(counts))
        given = torch.cat([self.experts.of(expert, part) for expert, part in parts if len(part)])
        if not router.scales_input:
            given = given * share
        return torch.zeros_like(rows).index_add(0, tokens, given)

    def _of_one(self, row: Float[Tensor, "1 D"], routing: Routing) -> Float[Tensor, "1 D"]:
        """The only row's experts, in order: the sum that sorting would give, to the last bit."""
        chosen = sorted(zip(routing.chosen[0].tolist(), routing.weights[0], strict=True))
        out = torch.zeros_like(row)
        for expert, weight in chosen:
            share = weight.to(row.dtype)
            if self.spec.router.scales_input:
                out = out + self.experts.of(expert, row * share)
            else:
                out = out + self.experts.of(expert, row) * share
        return out


def load_balance(routings: list[Routing]) -> Float[Tensor, ""]:
    """E times the sum over experts of (share of choices) x (mean probability): k when even.

    All layers' tokens count as one population. Source: Fedus et al. 2021 (Switch), arXiv:
    2101.03961, equations 4 to 6, over k choices as in Mixtral.
    """
    scores = torch.cat([routing.scores for routing in routings])
    chosen = torch.cat([routing.chosen for routing in routings])
    experts = scores.shape[-1]
    shares = torch.bincount(chosen.flatten(), minlength=experts) / len(chosen)
    return experts * (shares * scores.mean(0)).sum()

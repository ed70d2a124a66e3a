"""Attention whose keys and values are made from one narrow latent vector per position.

Axes: B batch rows, T new positions, S cached + new positions, D model width, H heads, c latent
width, n plain channels of a head, r turning ones, d = n + r, k = c + r what is kept of a position,
e width of a value.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.attention import BACKENDS
from ardor.arch.blocked import Scores
from ardor.arch.cache import Memory
from ardor.arch.layout import Layout
from ardor.arch.linear import Linear
from ardor.arch.norm import norm
from ardor.arch.positions import Rotation, rotate


class LatentAttention(nn.Module):
    """Multi-head latent attention; only the latents and the turned shared key are cached.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, width: int, spec: specs.LatentAttention, backend: str):
        super().__init__()
        self.spec, self.backend = spec, backend
        H, turning = spec.heads, spec.rope.rotated
        queries = H * (spec.plain_width + turning)
        if spec.query_rank is None:
            self.q_proj = Linear(width, queries)
        else:
            self.q_down_proj = Linear(width, spec.query_rank, bias=spec.bias)
            self.q_norm = norm(spec.query_rank, spec.norm)
            self.q_up_proj = Linear(spec.query_rank, queries)
        self.kv_down_proj = Linear(width, spec.kv_rank + turning, bias=spec.bias)
        self.kv_norm = norm(spec.kv_rank, spec.norm)
        self.kv_up_proj = Linear(spec.kv_rank, H * (spec.plain_width + spec.value_width))
        self.o_proj = Linear(H * spec.value_width, width, bias=spec.bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotations: dict[specs.Rope, Rotation],
        memory: Memory,
        index: int,
    ) -> Float[Tensor, "B T D"]:
        spec, H = self.spec, self.spec.heads
        turn = rotations[spec.rope]
        widths = (spec.plain_width, spec.rope.rotated)
        q = self._queries(x).unflatten(-1, (H, -1)).transpose(1, 2)  # (B, H, T, n + r)
        q_plain, q_turning = q.split(widths, dim=-1)
        q = torch.cat([q_plain, rotate(q_turning, turn)], -1)

        latent, k_turning = self.kv_down_proj(x).split((spec.kv_rank, spec.rope.rotated), -1)
        shared = torch.cat([self.kv_norm(latent), rotate(k_turning[:, None], turn)[:, 0]], -1)
        (shared,) = memory.write(index, (shared[:, None],))  # (B, 1, S, k)
        # A module that stands in for the map is only to be called, so what it gives is expanded.
        cached = memory.cache is not None
        one_by_one = cached and x.shape[1] == 1 and type(self.kv_up_proj) is Linear
        attend = self.attend_latents if one_by_one else self.attend_expanded
        return self.o_proj(attend(q, shared, memory.layout).transpose(1, 2).flatten(-2))

    def attend_expanded(
        self, q: Float[Tensor, "B H T d"], shared: Float[Tensor, "B 1 S k"], layout: Layout
    ) -> Float[Tensor, "B H T e"]:
        """The reference: keys and values of every head are made from the latents."""
        spec, H = self.spec, self.spec.heads
        latent, k_turning = shared.split((spec.kv_rank, spec.rope.rotated), -1)
        kv = self.kv_up_proj(latent[:, 0]).unflatten(-1, (H, -1)).transpose(1, 2)
        k_plain, v = kv.split((spec.plain_width, spec.value_width), -1)  # (B, H, S, n), (.., e)
        k = torch.cat([k_plain, k_turning.expand(-1, H, -1, -1)], -1)
        return BACKENDS[self.backend](q, k, v, layout, Scores(spec.scale))

    def attend_latents(
        self, q: Float[Tensor, "B H T d"], shared: Float[Tensor, "B 1 S k"], layout: Layout
    ) -> Float[Tensor, "B H T e"]:
        """The same, from queries that are taken to the latents: nothing is made of the whole past.

        q . (K c) = (K^T q) . c, and the sum of w (V c) is V times the sum of w c. The latents are
        wider than keys and values, so for many queries it is slower than `attend_expanded`.

        Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2.
        """
        spec = self.spec
        widths = (spec.plain_width, spec.value_width)
        maps = self.kv_up_proj.weight.to(q.dtype).unflatten(0, (spec.heads, -1))  # (H, n + e, c)
        to_keys, to_values = maps.split(widths, 1)
        q_plain, q_turning = q.split((spec.plain_width, spec.rope.rotated), -1)
        q_latent = torch.einsum("bhtn,hnc->bhtc", q_plain, to_keys)
        q = torch.cat([q_latent, q_turning], -1)
        latent = shared[..., : spec.kv_rank]
        mixed = BACKENDS[self.backend](q, shared, latent, layout, Scores(spec.scale))
        return torch.einsum("bhtc,hec->bhte", mixed, to_values)

    def _queries(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T inner"]:
        if self.spec.query_rank is None:
            return self.q_proj(x)
        return self.q_up_proj(self.q_norm(self.q_down_proj(x)))

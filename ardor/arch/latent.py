"""Attention whose keys and values are made from one narrow latent vector per position.

Axes: B batch rows, T new positions, S cached + new positions, D model width, H heads, c latent
width, n plain channels of a head, r turning ones, e width of a value.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ardor.arch import spec as specs
from ardor.arch.attention import BACKENDS
from ardor.arch.blocked import Scores
from ardor.arch.cache import KVCache
from ardor.arch.layout import Cached, Layout
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
        layout: Layout,
        rotations: dict[specs.Rope, Rotation],
        cache: KVCache | None,
        index: int,
    ) -> Float[Tensor, "B T D"]:
        spec, H = self.spec, self.spec.heads
        turn = rotations[spec.rope]
        widths = (spec.plain_width, spec.rope.rotated)
        q = self._queries(x).unflatten(-1, (H, -1)).transpose(1, 2)  # (B, H, T, n + r)
        q_plain, q_turning = q.split(widths, dim=-1)
        q = torch.cat([q_plain, rotate(q_turning, turn)], -1)

        latent, k_turning = self.kv_down_proj(x).split((spec.kv_rank, spec.rope.rotated), -1)
        # (B, 1, T, c) and (B, 1, T, r)
        latent, k_turning = self.kv_norm(latent)[:, None], rotate(k_turning[:, None], turn)
        if cache is not None:
            assert isinstance(layout, Cached)
            (held,) = cache.write(index, (torch.cat([latent, k_turning], -1),), layout)
            latent, k_turning = held.split((spec.kv_rank, spec.rope.rotated), -1)
        kv = self.kv_up_proj(latent[:, 0]).unflatten(-1, (H, -1)).transpose(1, 2)
        k_plain, v = kv.split((spec.plain_width, spec.value_width), -1)  # (B, H, S, n), (.., e)
        k = torch.cat([k_plain, k_turning.expand(-1, H, -1, -1)], -1)
        mixed = BACKENDS[self.backend](q, k, v, layout, Scores(spec.scale))
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _queries(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T inner"]:
        if self.spec.query_rank is None:
            return self.q_proj(x)
        return self.q_up_proj(self.q_norm(self.q_down_proj(x)))

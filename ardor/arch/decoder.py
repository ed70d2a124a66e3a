"""The decoder: token ids -> embeddings -> layers -> norm -> logits. Every family runs through here.

Axes: B batch rows, T new positions, D model width, H query heads, K kv heads, d head width,
F ffn width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from ardor.arch import spec as specs
from ardor.arch.attention import BACKENDS
from ardor.arch.cache import KVCache
from ardor.arch.gate import gated
from ardor.arch.layout import Cached, Layout, Packed
from ardor.arch.linear import Linear
from ardor.arch.norm import norm
from ardor.arch.positions import Rotation, rotate, rotation
from ardor.errors import ConfigError, ShapeError
from ardor.kernels.linear import linear

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Embedding(nn.Module):
    """Row `id` of the weight for every id."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return F.embedding(ids, self.weight)


class Attention(nn.Module):
    """Masked self-attention over the position's own document, with grouped keys and values."""

    def __init__(self, width: int, spec: specs.Attention, backend: str):
        super().__init__()
        self.spec, self.backend = spec, backend
        inner, shared = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
        self.q_proj = Linear(width, inner, bias=spec.qkv_bias)
        self.k_proj = Linear(width, shared, bias=spec.qkv_bias)
        self.v_proj = Linear(width, shared, bias=spec.qkv_bias)
        self.o_proj = Linear(inner, width, bias=spec.out_bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        layout: Layout,
        rotations: dict[specs.Rope, Rotation],
        cache: KVCache | None,
        index: int,
    ) -> Float[Tensor, "B T D"]:
        heads = (-1, self.spec.head_width)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if self.spec.rope is not None:
            by = rotations[self.spec.rope]
            q, k = rotate(q, by), rotate(k, by)
        if cache is not None:
            assert isinstance(layout, Cached)
            k, v = cache.write(index, k, v, layout)
        mixed = BACKENDS[self.backend](q, k, v, layout, scale=self.spec.scale)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) when not."""

    def __init__(self, width: int, spec: specs.Mlp):
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.gate_proj = Linear(width, spec.width, bias=spec.bias) if spec.gated else None
        self.up_proj = Linear(width, spec.width, bias=spec.bias)
        self.down_proj = Linear(spec.width, width, bias=spec.bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(gated(self.act, self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, width: int, spec: specs.Layer, backend: str):
        super().__init__()
        self.mixer_norm = norm(width, spec.norm)
        self.mixer = Attention(width, spec.mixer, backend)
        self.ffn_norm = norm(width, spec.norm)
        self.ffn = Mlp(width, spec.ffn)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        layout: Layout,
        rotations: dict[specs.Rope, Rotation],
        cache: KVCache | None,
        index: int,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.mixer(self.mixer_norm(x), layout, rotations, cache, index)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """A decoder-only language model, as its spec says.

    Weights keep the dtype they are stored in; activations have dtype `compute`, logits float32.
    """

    def __init__(
        self, spec: specs.Decoder, *, compute: torch.dtype = torch.float32, attn: str = "sdpa"
    ):
        super().__init__()
        if attn not in BACKENDS:
            raise ConfigError(
                f"attn_implementation={attn!r} is not one of {', '.join(BACKENDS)}; "
                "leave it out to let Ardor choose"
            )
        self.spec, self.compute, self.attn = spec, compute, attn
        self.embed_tokens = Embedding(spec.vocab, spec.width)
        self.embed_positions = (
            Embedding(spec.max_positions, spec.width) if spec.learned_positions else None
        )
        self.layers = nn.ModuleList(Layer(spec.width, layer, attn) for layer in spec.layers)
        self.norm = norm(spec.width, spec.norm)
        self.lm_head = None if spec.tied else Linear(spec.width, spec.vocab)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        layout: Layout | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The state after the final norm at every position, from which `logits` predicts the next.

        Without a cache `layout` says where documents end (None: each row is one). With a cache the
        tokens continue its rows; the caller advances it by T afterwards.

        Raises: ShapeError if learned positions run out, or the layout does not fit the tokens.
        """
        if layout is None:
            B, T = tokens.shape
            layout = cache.layout(T) if cache is not None else Packed.whole(B, T)
        positions = layout.positions(tokens.device)
        if positions.shape != tokens.shape:
            raise ShapeError(
                f"layout of {tuple(positions.shape)} does not fit tokens {tuple(tokens.shape)}"
            )
        x = self.embed_tokens(tokens).to(self.compute)
        if self.embed_positions is not None:
            if layout.longest > self.spec.max_positions:
                raise ShapeError(
                    f"{layout.longest} positions, but this model has learned only "
                    f"{self.spec.max_positions}; shorten the text or set a smaller max_length"
                )
            x = x + self.embed_positions(positions).to(self.compute)
        rotations = {
            rope: rotation(rope, positions, self.compute)
            for rope in {layer.mixer.rope for layer in self.spec.layers}
            if rope is not None
        }
        for index, layer in enumerate(self.layers):
            x = layer(x, layout, rotations, cache, index)
        return self.norm(x)

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits in the dtype of `hidden`."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return linear(hidden, self.embed_tokens.weight.to(hidden.dtype), None)

    def head_parts(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """(function, parameters): `head(x)` is function(x, *parameters), for the chunked loss.

        Whatever module stands in for the head, its trained parameters are among them.
        """
        head = self.lm_head
        if head is None:
            return partial(linear, bias=None), (self.embed_tokens.weight,)
        named = dict(head.named_parameters())

        def with_parameters(x: Tensor, *values: Tensor) -> Tensor:
            return functional_call(head, dict(zip(named, values, strict=True)), (x,))

        return with_parameters, tuple(named.values())

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Unnormalised log-probabilities of the next token, float32."""
        return self.head(hidden).float()

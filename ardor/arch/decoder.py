"""The decoder: token ids -> embeddings -> layers -> norm -> logits. Every family runs through here.

Axes: B batch rows, T new positions, D model width, H query heads, K kv heads, d head width,
F ffn width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from ardor.arch import spec as specs
from ardor.arch.attention import BACKENDS
from ardor.arch.blocked import Scores
from ardor.arch.cache import KVCache, Memory
from ardor.arch.causal import CausalLM
from ardor.arch.experts import Experts, Routing
from ardor.arch.inputs import Embedding, TokenGate, TokenInputs, scaled
from ardor.arch.latent import LatentAttention
from ardor.arch.layout import Layout, Packed, Reach
from ardor.arch.linear import Linear, LinearHead
from ardor.arch.mlp import Mlp
from ardor.arch.norm import HeadNorm, norm
from ardor.arch.positions import Rotation, growth, rotate, rotation
from ardor.errors import ShapeError

Rotations = dict[specs.Rope, Rotation]


class Attention(nn.Module):
    """Masked self-attention over the position's own document, with grouped keys and values."""

    def __init__(self, width: int, spec: specs.Attention, backend: str):
        super().__init__()
        self.spec, self.backend = spec, backend
        self.scores = Scores(
            spec.scale,
            Reach(spec.window, spec.chunk),
            spec.softcap,
            spec.alibi,
            spec.alibi_coarse,
        )
        inner, shared = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
        self.q_proj = Linear(width, inner, bias=spec.qkv_bias)
        own = spec.kv_layer is None
        self.k_proj = Linear(width, shared, bias=spec.qkv_bias) if own else None
        apart = own and not spec.values_from_keys
        self.v_proj = Linear(width, shared, bias=spec.qkv_bias) if apart else None
        self.o_proj = Linear(inner, width, bias=spec.out_bias)
        self.q_norm, k_norm = (
            _qk_norm(spec.qk_norm, heads, spec.head_width) for heads in (spec.heads, spec.kv_heads)
        )
        self.k_norm = k_norm if own else None
        value_norm = spec.value_norm if own else None
        self.v_norm = None if value_norm is None else norm(spec.head_width, value_norm)
        self.sinks = nn.Parameter(torch.empty(spec.heads)) if spec.sinks else None

    def forward(
        self, x: Float[Tensor, "B T D"], rotations: Rotations, memory: Memory, index: int
    ) -> Float[Tensor, "B T D"]:
        turn = None if self.spec.rope is None else rotations[self.spec.rope]
        q = self._heads(self.q_proj(x), self.q_norm, turn)  # (B, H, T, d)
        if self.spec.temperature is not None:
            q = q * growth(self.spec.temperature, memory.layout.positions(q.device)).to(q.dtype)
        if self.k_proj is None:
            assert self.spec.kv_layer is not None
            k, v = memory.read(self.spec.kv_layer, q.device)
        else:
            keys = self.k_proj(x)
            values = keys if self.v_proj is None else self.v_proj(x)
            k = self._heads(keys, self.k_norm, turn)  # (B, K, T, d)
            v = self._heads(values, None, None)
            v = v if self.v_norm is None else self.v_norm(v)
            k, v = memory.write(index, (k, v))
        mixed = BACKENDS[self.backend](q, k, v, memory.layout, self.scores, self.sinks)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(
        self, x: Float[Tensor, "B T inner"], normalise: nn.Module | None, turn: Rotation | None
    ) -> Float[Tensor, "B H T d"]:
        spec, qk = self.spec, self.spec.qk_norm
        if normalise is not None and qk is not None and qk.over == "width":
            x, normalise = normalise(x), None
        if spec.clip is not None:
            x = x.clamp(-spec.clip, spec.clip)
        x = x.unflatten(-1, (-1, spec.head_width))
        if normalise is not None and qk is not None and not qk.after_rope:
            x, normalise = normalise(x), None
        x = x.transpose(1, 2)
        if turn is not None:
            x = rotate(x, turn)
        return x if normalise is None else normalise(x.transpose(1, 2)).transpose(1, 2)


def _qk_norm(spec: specs.QKNorm | None, heads: int, width: int) -> nn.Module | None:
    match spec:
        case None:
            return None
        case specs.QKNorm(over="heads"):
            return HeadNorm(heads, width, spec.norm)
        case specs.QKNorm(over="width"):
            return norm(heads * width, spec.norm)
        case _:
            return norm(width, spec.norm)


def _mixer(
    width: int, spec: specs.Attention | specs.LatentAttention, backend: str
) -> Attention | LatentAttention:
    if isinstance(spec, specs.LatentAttention):
        return LatentAttention(width, spec, backend)
    return Attention(width, spec, backend)


def _ffn(width: int, spec: specs.Mlp | specs.Experts) -> Mlp | Experts:
    return Experts(width, spec) if isinstance(spec, specs.Experts) else Mlp(width, spec)


class Layer(nn.Module):
    """Mixer and feed-forward on the residual stream, with norms where `placement` puts them."""

    def __init__(
        self, width: int, spec: specs.Layer, backend: str, token_input: specs.TokenInput | None
    ):
        super().__init__()
        self.spec = spec
        reads_normed = spec.placement not in ("post", "after")
        writes_normed = spec.placement in ("post", "sandwich", "after")
        own = spec.placement != "parallel"  # the feed-forward's norms are not the mixer's

        def norm_if(wanted: bool) -> nn.Module | None:
            return norm(width, spec.norm) if wanted else None

        self.mixer_norm = norm_if(reads_normed)
        self.mixer = _mixer(width, spec.mixer, backend)
        self.mixer_out_norm = norm_if(writes_normed)
        norms_itself = isinstance(spec.ffn, specs.Experts) and spec.ffn.norm is not None
        self.ffn_norm = norm_if(reads_normed and own and not norms_itself)
        self.ffn = _ffn(width, spec.ffn)
        self.ffn_out_norm = norm_if(writes_normed)
        self.token_gate = None if token_input is None else TokenGate(width, token_input)
        # A buffer: it comes with the weights, and is never trained.
        self.register_buffer("scalar", torch.ones(1) if spec.scalar else None)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotations: Rotations,
        memory: Memory,
        index: int,
        routings: list[Routing] | None = None,
        vector: Float[Tensor, "B T P"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = self._mixed_and_fed(x, rotations, memory, index, routings)
        if self.token_gate is not None:
            x = x + self.token_gate(x, vector)
        return x if self.scalar is None else x * self.scalar.to(x.dtype)

    def _mixed_and_fed(
        self,
        x: Tensor,
        rotations: Rotations,
        memory: Memory,
        index: int,
        routings: list[Routing] | None,
    ) -> Tensor:
        spec = self.spec
        read = x if self.mixer_norm is None else self.mixer_norm(x)
        mixed = self.mixer(read, rotations, memory, index)
        if spec.placement in ("parallel", "parallel_two"):
            read = read if self.ffn_norm is None else self.ffn_norm(x)
            return x + spec.residual_scale * (mixed + self._ffn(read, routings))
        x = self._add(x, read, mixed, self.mixer_out_norm)
        read = x if self.ffn_norm is None else self.ffn_norm(x)
        return self._add(x, read, self._ffn(read, routings), self.ffn_out_norm)

    def _ffn(self, x: Tensor, routings: list[Routing] | None) -> Tensor:
        return self.ffn(x, routings) if isinstance(self.ffn, Experts) else self.ffn(x)

    def _add(self, x: Tensor, read: Tensor, made: Tensor, out_norm: nn.Module | None) -> Tensor:
        spec = self.spec
        if spec.placement == "after":
            assert out_norm is not None
            return out_norm(x + made)
        if out_norm is not None:
            made = out_norm(made)
        if spec.residual_scale != 1.0:
            made = made * spec.residual_scale
        return (read if spec.residual_normed else x) + made


class Decoder(CausalLM):
    """A decoder-only language model, as its spec says.

    Weights keep the dtype they are stored in; activations have dtype `compute`, logits float32.
    """

    def __init__(
        self, spec: specs.Decoder, *, compute: torch.dtype = torch.float32, attn: str = "sdpa"
    ):
        super().__init__()
        assert attn in BACKENDS, attn  # see `backend_for`
        self.spec, self.compute, self.attn = spec, compute, attn
        self.attn_why = "as asked"  # for people
        narrow = spec.embed_width or spec.width
        projected = spec.embed_width is not None
        self.embed_tokens = Embedding(spec.vocab, narrow)
        self.embed_positions = (
            Embedding(spec.max_positions + spec.position_offset, spec.width)
            if spec.learned_positions
            else None
        )
        self.embed_in_proj = Linear(narrow, spec.width) if projected else None
        self.embed_norm = None if spec.embed_norm is None else norm(spec.width, spec.embed_norm)
        inputs = spec.token_input
        self.token_inputs = (
            None if inputs is None else TokenInputs(spec.width, len(spec.layers), inputs)
        )
        self.layers = nn.ModuleList(Layer(spec.width, layer, attn, inputs) for layer in spec.layers)
        self.norm = None if spec.norm is None else norm(spec.width, spec.norm)
        self.embed_out_proj = Linear(spec.width, narrow) if projected else None
        self.lm_head = None if spec.tied else Linear(narrow, spec.vocab, bias=spec.head_bias)

    @property
    def facts(self) -> specs.Decoder:
        return self.spec

    def new_cache(self, *, rows: int, capacity: int) -> KVCache:
        """An empty cache of `rows` rows that hold up to `capacity` positions each."""
        devices = self.device if self.devices is None else self.devices.layers
        return KVCache(self.spec, rows=rows, capacity=capacity, dtype=self.compute, device=devices)

    def attend_by(self, name: str, why: str) -> None:
        """Use another backend in every layer; `why` is kept beside it, for people."""
        self.attn, self.attn_why = name, why
        layers: Iterable[Any] = self.layers
        for layer in layers:
            layer.mixer.backend = name

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        layout: Layout | None = None,
        cache: KVCache | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The state after the final norm at every position, from which `logits` predicts the next.

        Without a cache `layout` says where documents end (None: each row is one). With a cache the
        tokens continue its rows; the caller advances it by T afterwards. `routings` takes what
        each layer's router decided.

        Raises: ShapeError if learned positions run out, the layout does not fit the tokens, or the
        cache has become stale.
        """
        if layout is None:
            B, T = tokens.shape
            layout = cache.layout(T) if cache is not None else Packed.whole(B, T)
        positions = layout.positions(tokens.device)
        if positions.shape != tokens.shape:
            raise ShapeError(
                f"layout of {tuple(positions.shape)} does not fit tokens {tuple(tokens.shape)}"
            )
        if cache is not None and (stale := cache.stale(tokens.shape[1])):
            raise ShapeError(
                f"rows {stale} of the cache were read as shorter texts, which turn otherwise "
                "(rope scaling by length); read them again from their start in one call"
            )
        x = self._embedded(tokens, positions, layout.longest)
        rotations = self._rotations(layout, positions)
        memory = Memory(self.spec, layout, cache)
        vectors = None if self.token_inputs is None else self.token_inputs(tokens, x)
        for index, layer in enumerate(self.layers):
            vector = None if vectors is None else vectors[index]
            x = layer(x, rotations, memory, index, routings, vector)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.embed_out_proj is None else self.embed_out_proj(x)

    def _embedded(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], longest: int
    ) -> Float[Tensor, "B T D"]:
        spec = self.spec
        x = self.embed_tokens(tokens).to(self.compute)
        if spec.embed_scale != 1.0 and not spec.embed_scale_rounded:
            x = x * spec.embed_scale
        elif spec.embed_scale != 1.0:
            x = scaled(x, spec.embed_scale, self.embed_tokens)
        if self.embed_in_proj is not None:
            x = self.embed_in_proj(x)
        if self.embed_positions is not None:
            if longest > spec.max_positions:
                raise ShapeError(
                    f"{longest} positions, but this model has learned only "
                    f"{spec.max_positions}; shorten the text or set a smaller max_length"
                )
            x = x + self.embed_positions(positions + spec.position_offset).to(self.compute)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _rotations(self, layout: Layout, positions: Int[Tensor, "B T"]) -> Rotations:
        ropes = {layer.mixer.rope for layer in self.spec.layers}
        lengths = layout.text_lengths(positions.device)
        return {
            rope: rotation(rope, positions, self.compute, lengths)
            for rope in ropes
            if rope is not None
        }

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits in the dtype of `hidden`."""
        if self.lm_head is None:
            return LinearHead(self._finish())(hidden, self.embed_tokens.weight)
        logits, finish = self.lm_head(hidden), self._finish()
        return logits if finish is None else finish(logits)

    def head_parts(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """(function, parameters): `head(x)` is function(x, *parameters), for the chunked loss.

        Whatever module stands in for the head, its trained parameters are among them.
        """
        head, finish = self.lm_head, self._finish()
        if head is None:
            return LinearHead(finish), (self.embed_tokens.weight,)
        if type(head) is Linear:
            bias = () if head.bias is None else (head.bias,)
            return LinearHead(finish), (head.weight, *bias)
        named = dict(head.named_parameters())

        def with_parameters(x: Tensor, *values: Tensor) -> Tensor:
            made = functional_call(head, dict(zip(named, values, strict=True)), (x,))
            return made if finish is None else finish(made)

        return with_parameters, tuple(named.values())

    def _finish(self) -> Callable[[Tensor], Tensor] | None:
        """What the spec does with logits after the head, if anything."""
        scale, cap = self.spec.logit_scale, self.spec.logit_softcap
        if scale == 1.0 and cap is None:
            return None

        def finish(logits: Tensor) -> Tensor:
            logits = logits * scale if scale != 1.0 else logits
            return logits if cap is None else torch.tanh(logits / cap) * cap

        return finish

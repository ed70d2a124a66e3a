"""What each layer keeps of every token until the backward pass, and what it needs meanwhile.

Numbers are bytes of one token. They follow arch and kernels line by line: a linear keeps its input
where its weight or its adapter is trained; a norm keeps its input; the compiled gate keeps gate and
up; attention keeps queries, keys, values, its result and a float32 per head, never scores.

Axes: D model width, H query heads, K kv heads, d head width, F ffn width, R adapter rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ardor.arch import spec as specs

EXPERTS = "ffn.experts"  # where a layer has them
COMPILED_ACTS = ("silu", "gelu_tanh")  # arch.gate.COMPILED: one pass that keeps gate and up only


@dataclass(frozen=True, kw_only=True)
class How:
    """How a layer is computed."""

    width: int  # bytes of an activation
    trained: frozenset[str]  # linears of the layer whose weights are trained
    adapted: Mapping[str, int]  # those with an adapter, and the rows of what its A gives
    scaled: int = 0  # outputs of linears that DoRA's magnitudes are applied to
    flash: bool  # attention in compiled blocks
    compiled: bool
    ragged: bool  # the results of documents of different lengths are joined in one more tensor

    def keeps_input(self, *linears: str) -> bool:
        """Whether the input that these linears share is kept."""
        return any(name in self.adapted or name in self.trained for name in linears)


def per_token(width: int, layer: specs.Layer, how: How) -> int:
    """Bytes that one layer keeps of a token."""
    # What A gives, which B's gradient needs; that of experts is counted with them.
    low = sum(r for name, r in how.adapted.items() if not name.startswith(f"{EXPERTS}."))
    numbers = _stream(width, layer, how) + low + how.scaled
    if isinstance(layer.mixer, specs.LatentAttention):
        numbers += _latent(layer.mixer, how)
    else:
        numbers += _attention(layer.mixer, how)
    return how.width * numbers + ffn_per_token(width, layer, how) + 4 * layer.mixer.heads


def ffn_per_token(width: int, layer: specs.Layer, how: How) -> int:
    """Of these, what the feed-forward keeps beside its input."""
    if isinstance(layer.ffn, specs.Experts):
        return how.width * _experts(width, layer.ffn, how)
    return how.width * _mlp(layer.ffn, how, "ffn")


def working_per_token(width: int, layer: specs.Layer, how: How, *, training: bool) -> int:
    """Bytes that come and go for a token while one layer is computed.

    Backwards that is the gradient of the gate, of up and of their product at once. Forwards, gate,
    up and product; the compiled feed-forward holds its float32 result only.
    """
    mixer = layer.mixer
    if isinstance(mixer, specs.LatentAttention):
        wide = mixer.plain_width + mixer.rope.rotated
        attention = mixer.heads * (3 * wide + 2 * mixer.value_width)
    else:
        attention = 2 * (mixer.heads + mixer.kv_heads) * mixer.head_width
    if isinstance(layer.ffn, specs.Experts):
        chosen = layer.ffn.router.per_token
        inner = chosen * (3 * layer.ffn.expert.width + 2 * width)
        gated = layer.ffn.expert.gated
    else:
        inner, gated = (3 if layer.ffn.gated else 2) * layer.ffn.width, layer.ffn.gated
    if not training and how.flash and gated:
        inner = 3 * width
    return how.width * (2 * width + max(attention, inner))


def _stream(width: int, layer: specs.Layer, how: How) -> int:
    """Inputs of the norms, which are the residual stream, and of what reads it."""
    mixer_in = how.keeps_input("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")
    ffn_in = how.keeps_input("ffn.gate_proj", "ffn.up_proj") or isinstance(layer.ffn, specs.Experts)
    stream = {"parallel": 1, "parallel_two": 1, "sandwich": 4}.get(layer.placement, 2)
    if layer.placement == "parallel":  # both read the same
        return width * (stream + (mixer_in or ffn_in))
    return width * (stream + mixer_in + ffn_in)


def _attention(mixer: specs.Attention, how: How) -> int:
    queries, keys = mixer.heads * mixer.head_width, mixer.kv_heads * mixer.head_width
    plain = mixer.softcap is None and mixer.alibi is None and not mixer.sinks
    # PyTorch's attention wants keys and values once for each query head.
    read = keys if how.flash or not plain or mixer.window is not None else queries
    numbers = (2 + how.ragged) * queries + (2 * read if mixer.kv_layer is None else 0)
    own = queries + (keys if mixer.kv_layer is None else 0)
    if mixer.qk_norm is not None:
        # Of each head with weights of its own: in float32, before and after its unit norm.
        numbers += own * (4 * 4 // how.width if mixer.qk_norm.over == "heads" else 1)
    if mixer.clip is not None:
        numbers += own + keys
    if mixer.value_norm is not None and mixer.kv_layer is None:
        numbers += keys
    return numbers


def _latent(mixer: specs.LatentAttention, how: How) -> int:
    heads = mixer.heads
    wide = mixer.plain_width + mixer.rope.rotated
    queries = 2 * (mixer.query_rank or 0)  # before and after their norm
    return queries + 2 * mixer.kv_rank + heads * (2 * wide + 2 * mixer.value_width)


def _mlp(ffn: specs.Mlp, how: How, name: str) -> int:
    product = how.keeps_input(f"{name}.down_proj")
    if not ffn.gated:
        kept = {"relu": 1, "gelu": 1, "gelu_tanh": 1, "silu": 1, "quick_gelu": 2, "relu2": 1}
        shared = ffn.act == "relu"  # its result is what its gradient needs
        return ffn.width * (kept[ffn.act] + (product and not shared))
    compiled = how.compiled and ffn.act in COMPILED_ACTS
    kept = 2 if compiled else 3
    if ffn.limit is not None:
        kept += 2
    return ffn.width * (kept + product)


def _experts(width: int, ffn: specs.Experts, how: How) -> int:
    """Rows of a token are repeated for each of its experts.

    What comes out is kept twice, for its product with the weight and for the sum over experts. What
    goes in is kept where the experts are trained or adapted.
    """
    inner = _mlp(ffn.expert, how, EXPERTS)
    inner += sum(r for name, r in how.adapted.items() if name.startswith(f"{EXPERTS}."))
    reads = how.keeps_input(f"{EXPERTS}.gate_proj", f"{EXPERTS}.up_proj")
    numbers = ffn.router.per_token * (inner + width * (2 + reads))
    numbers += 2 * ffn.count * 4 // how.width  # the router's scores, float32
    if ffn.shared is not None:
        numbers += _mlp(ffn.shared, how, "ffn.shared") + width
    if ffn.norm is not None:
        numbers += 2 * width * (2 if ffn.shared is not None else 1)
    return numbers

"""The parameters of a decoder by name and shape, from its spec alone.

Axes: D model width, V vocabulary, F ffn width, E experts, L layers, P width of a layer's vector.
"""

import math
from collections.abc import Iterator, Mapping

from ardor.arch import spec as specs

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def parameters(spec: specs.Decoder) -> dict[str, Shape]:
    """Every parameter of `arch.decoder.Decoder(spec)`, under its name there; modules in order."""
    return dict(_decoder(spec))


def count(shapes: Mapping[str, Shape]) -> int:
    """How many numbers they hold."""
    return sum(map(math.prod, shapes.values()))


def is_linear(name: str, shape: Shape) -> bool:
    """Whether it is the weight of a linear map in the layers: what is adapted.

    The same map of every expert, in three axes, is one too; a router is none.
    """
    in_layers = name.startswith("layers.") and name.endswith(".weight")
    return in_layers and len(shape) > 1 and "norm" not in name and ".router." not in name


def is_quantized(name: str, shape: Shape) -> bool:
    """Whether quantizing a model takes this weight: that of a linear map, but for a gate's."""
    return is_linear(name, shape) and ".shared_gate." not in name


def _decoder(spec: specs.Decoder) -> Named:
    narrow = spec.embed_width or spec.width
    yield "embed_tokens.weight", (spec.vocab, narrow)
    if spec.learned_positions:
        yield "embed_positions.weight", (spec.max_positions + spec.position_offset, spec.width)
    if spec.embed_width is not None:
        yield from _linear("embed_in_proj", narrow, spec.width)
    yield from _norm("embed_norm", spec.width, spec.embed_norm)
    if spec.token_input is not None:
        inner = len(spec.layers) * spec.token_input.width
        yield "token_inputs.embed.weight", (spec.token_input.rows, inner)
        yield from _linear("token_inputs.context_proj", spec.width, inner)
        yield from _norm("token_inputs.context_norm", spec.token_input.width, spec.token_input.norm)
    for index, layer in enumerate(spec.layers):
        for name, shape in _layer(spec, layer):
            yield f"layers.{index}.{name}", shape
    yield from _norm("norm", spec.width, spec.norm)
    if spec.embed_width is not None:
        yield from _linear("embed_out_proj", spec.width, narrow)
    if not spec.tied:
        yield from _linear("lm_head", narrow, spec.vocab, spec.head_bias)


def _layer(spec: specs.Decoder, layer: specs.Layer) -> Named:
    width, placement = spec.width, layer.placement
    reads = placement not in ("post", "after")
    writes = placement in ("post", "sandwich", "after")
    norms_itself = isinstance(layer.ffn, specs.Experts) and layer.ffn.norm is not None
    if reads:
        yield from _norm("mixer_norm", width, layer.norm)
    if isinstance(layer.mixer, specs.LatentAttention):
        yield from _latent(width, layer.mixer)
    else:
        yield from _attention(width, layer.mixer)
    if writes:
        yield from _norm("mixer_out_norm", width, layer.norm)
    if reads and placement != "parallel" and not norms_itself:
        yield from _norm("ffn_norm", width, layer.norm)
    if isinstance(layer.ffn, specs.Experts):
        yield from _experts(width, layer.ffn)
    else:
        yield from _mlp("ffn", width, layer.ffn)
    if writes:
        yield from _norm("ffn_out_norm", width, layer.norm)
    if (inputs := spec.token_input) is not None:
        yield from _linear("token_gate.gate_proj", width, inputs.width)
        yield from _linear("token_gate.out_proj", inputs.width, width)
        yield from _norm("token_gate.out_norm", width, inputs.norm)


def _attention(width: int, mixer: specs.Attention) -> Named:
    inner, shared = mixer.heads * mixer.head_width, mixer.kv_heads * mixer.head_width
    own = mixer.kv_layer is None
    if mixer.sinks:
        yield "mixer.sinks", (mixer.heads,)
    yield from _linear("mixer.q_proj", width, inner, mixer.qkv_bias)
    if own:
        yield from _linear("mixer.k_proj", width, shared, mixer.qkv_bias)
    if own and not mixer.values_from_keys:
        yield from _linear("mixer.v_proj", width, shared, mixer.qkv_bias)
    yield from _linear("mixer.o_proj", inner, width, mixer.out_bias)
    if mixer.qk_norm is not None:
        yield from _qk_norm("mixer.q_norm", mixer.heads, mixer.head_width, mixer.qk_norm)
        if own:
            yield from _qk_norm("mixer.k_norm", mixer.kv_heads, mixer.head_width, mixer.qk_norm)
    if own:
        yield from _norm("mixer.v_norm", mixer.head_width, mixer.value_norm)


def _qk_norm(name: str, heads: int, width: int, spec: specs.QKNorm) -> Named:
    if spec.over == "heads":
        yield f"{name}.weight", (heads, width)
    else:
        yield from _norm(name, heads * width if spec.over == "width" else width, spec.norm)


def _latent(width: int, mixer: specs.LatentAttention) -> Named:
    turning, heads = mixer.rope.rotated, mixer.heads
    queries = heads * (mixer.plain_width + turning)
    if mixer.query_rank is None:
        yield from _linear("mixer.q_proj", width, queries)
    else:
        yield from _linear("mixer.q_down_proj", width, mixer.query_rank, mixer.bias)
        yield from _norm("mixer.q_norm", mixer.query_rank, mixer.norm)
        yield from _linear("mixer.q_up_proj", mixer.query_rank, queries)
    yield from _linear("mixer.kv_down_proj", width, mixer.kv_rank + turning, mixer.bias)
    yield from _norm("mixer.kv_norm", mixer.kv_rank, mixer.norm)
    expanded = heads * (mixer.plain_width + mixer.value_width)
    yield from _linear("mixer.kv_up_proj", mixer.kv_rank, expanded)
    yield from _linear("mixer.o_proj", heads * mixer.value_width, width, mixer.bias)


def _mlp(name: str, width: int, ffn: specs.Mlp, experts: int | None = None) -> Named:
    """`experts`: so many of one shape, stacked."""
    if ffn.gated:
        yield from _linear(f"{name}.gate_proj", width, ffn.width, ffn.bias, experts)
    yield from _linear(f"{name}.up_proj", width, ffn.width, ffn.bias, experts)
    yield from _linear(f"{name}.down_proj", ffn.width, width, ffn.bias, experts)


def _experts(width: int, ffn: specs.Experts) -> Named:
    router = ffn.router
    yield "ffn.router.weight", (ffn.count, width)
    given = (("bias", router.bias), ("correction", router.correction))
    for leaf, there in (*given, ("expert_scale", router.expert_scale)):
        if there:
            yield f"ffn.router.{leaf}", (ffn.count,)
    yield from _norm("ffn.router.norm", width, router.norm)
    yield from _mlp("ffn.experts", width, ffn.expert, ffn.count)
    if ffn.shared is not None:
        yield from _mlp("ffn.shared", width, ffn.shared)
    if ffn.shared_gated:
        yield from _linear("ffn.shared_gate", width, 1)
    for which in ("in_norm", "out_norm"):
        yield from _norm(f"ffn.{which}", width, ffn.norm)
        if ffn.shared is not None:
            yield from _norm(f"ffn.shared_{which}", width, ffn.norm)


def _linear(
    name: str, inputs: int, outputs: int, bias: bool = False, experts: int | None = None
) -> Named:
    stack = () if experts is None else (experts,)
    yield f"{name}.weight", (*stack, outputs, inputs)
    if bias:
        yield f"{name}.bias", (*stack, outputs)


def _norm(name: str, width: int, norm: specs.Norm | None) -> Named:
    if norm is None:
        return
    if norm.weight != "none":
        yield f"{name}.weight", (width,)
    if norm.kind == "layer" and norm.bias:
        yield f"{name}.bias", (width,)

"""What a spec may not say: the one place where its values are held against each other.

A spec from a file is checked part by part as it is read, so that an error names the place in the
file; one from a family's config.json as a whole.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from ardor.arch.spec import (
    Attention,
    Decoder,
    Experts,
    LatentAttention,
    LongScaling,
    Norm,
    ProportionalScaling,
    QKNorm,
    Rope,
    Router,
)
from ardor.errors import ConfigError

# Whole numbers that may be 0; all others are at least 1.
_MAY_BE_ZERO = {"position_offset", "first", "plain_width", "kv_layer", "turning"}
# Numbers that must be above 0; the rest only finite.
_POSITIVE = {"eps", "theta", "factor", "softcap", "logit_softcap", "limit", "clip"}
_NOT_NEGATIVE = {"jitter", "balance"}


def check(spec: Decoder, where: str) -> None:
    """Raises: ConfigError for the first contradiction in `spec`, which `where` describes."""
    for path, part in _parts(spec, ""):
        for field, why in contradictions(part):
            place = f"{path}.{field}" if path else field
            raise ConfigError(f"{where}: {place} {why}")


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        yield path, value
        for field in fields(value):
            inside = f"{path}.{field.name}" if path else field.name
            yield from _parts(getattr(value, field.name), inside)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _parts(item, f"{path}[{index}]")


def contradictions(part: Any) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of one value of a spec; its own parts are not looked into."""
    for field in fields(part):
        if (why := _range(field.name, getattr(part, field.name))) is not None:
            yield field.name, why
            return
    match part:
        case Norm():
            yield from _norm(part)
        case QKNorm():
            yield from _qk_norm(part)
        case Rope():
            yield from _rope(part)
        case Attention():
            yield from _attention(part)
        case LatentAttention():
            if part.plain_width + part.rope.rotated < 1:
                yield "plain_width", "leaves queries and keys without a channel"
        case Router():
            yield from _router(part)
        case Experts():
            yield from _experts(part)
        case Decoder():
            yield from _decoder(part)


def _range(name: str, value: Any) -> str | None:
    if type(value) is int:
        least = 0 if name in _MAY_BE_ZERO else 1
        return None if value >= least else f"is {value}, expected at least {least}"
    if type(value) is float:
        if not math.isfinite(value):
            return f"is {value}, expected a finite number"
        if name in _POSITIVE and value <= 0:
            return f"is {value}, expected a number above 0"
        if name in _NOT_NEGATIVE and value < 0:
            return f"is {value}, expected at least 0"
    return None


def _norm(norm: Norm) -> Iterator[tuple[str, str]]:
    if norm.bias and norm.kind == "rms":
        yield "bias", "is true, but a norm of kind rms has none; use kind layer, or leave it out"


def _qk_norm(qk: QKNorm) -> Iterator[tuple[str, str]]:
    if qk.over == "heads" and qk.norm.bias:
        yield "norm.bias", "is true, but norms with a weight for each head (over: heads) have none"


def _rope(rope: Rope) -> Iterator[tuple[str, str]]:
    if rope.rotated % 2:
        yield "rotated", f"is {rope.rotated}, which is odd; channels turn in pairs"
    if isinstance(rope.scaling, ProportionalScaling) and rope.scaling.turning > rope.rotated // 2:
        yield "scaling.turning", f"is {rope.scaling.turning}, more than {rope.rotated // 2} pairs"
    if isinstance(rope.scaling, LongScaling):
        for name in ("short", "long"):
            if (found := len(getattr(rope.scaling, name))) != rope.rotated // 2:
                pairs = rope.rotated // 2
                yield f"scaling.{name}", f"has {found} divisors, expected one for {pairs} pairs"


def _attention(mixer: Attention) -> Iterator[tuple[str, str]]:
    heads, kv_heads = mixer.heads, mixer.kv_heads
    if heads % kv_heads:
        yield "heads", f"is {heads}, which is not a multiple of kv_heads={kv_heads}"
    if mixer.rope is not None and mixer.rope.rotated > mixer.head_width:
        rotated = mixer.rope.rotated
        yield "rope.rotated", f"is {rotated}, more than the head_width={mixer.head_width}"
    if mixer.alibi is not None and len(mixer.alibi) != heads:
        yield "alibi", f"has {len(mixer.alibi)} slopes, expected one for each of heads={heads}"
    if mixer.alibi is None and mixer.alibi_coarse:
        yield "alibi_coarse", "is true, but there is no alibi"


def _router(router: Router) -> Iterator[tuple[str, str]]:
    if router.kept_groups > router.groups:
        yield "kept_groups", f"is {router.kept_groups}, more than groups={router.groups}"


def _experts(ffn: Experts) -> Iterator[tuple[str, str]]:
    router, count = ffn.router, ffn.count
    if router.per_token > count:
        yield "router.per_token", f"is {router.per_token}, more than count={count} experts"
    elif count % router.groups:
        yield "router.groups", f"is {router.groups}, which does not divide count={count} experts"
    elif router.groups > 1:
        each = count // router.groups
        if router.per_token > each * router.kept_groups:
            kept = router.kept_groups
            yield (
                "router.per_token",
                f"is {router.per_token}, more than the {each * kept} experts in {kept} kept groups",
            )
        if each < 2 and router.group_score == "top2":
            yield "router.group_score", "is top2, but a group has one expert"
    if ffn.shared_gated and ffn.shared is None:
        yield "shared_gated", "is true, but there is no shared feed-forward"


def _decoder(spec: Decoder) -> Iterator[tuple[str, str]]:
    if not spec.layers:
        yield "layers", "is empty, expected at least one"
    if spec.head_bias and spec.tied:
        yield "head_bias", "is true, but a tied head is the embedding, which has no bias"
    for index, layer in enumerate(spec.layers):
        why = (
            None if isinstance(layer.mixer, LatentAttention) else _source(spec, index, layer.mixer)
        )
        if why is not None:
            yield f"layers[{index}].mixer.kv_layer", why


def _source(spec: Decoder, index: int, mixer: Attention) -> str | None:
    """What is wrong with the layer whose keys and values another one reads."""
    at = mixer.kv_layer
    if at is None:
        return None
    if at >= index:
        return f"is {at}, which is no layer before this one"
    source = spec.layers[at].mixer
    if isinstance(source, LatentAttention) or source.kv_layer is not None:
        return f"is {at}, a layer that makes no keys and values of its own"
    if (source.kv_heads, source.head_width) != (mixer.kv_heads, mixer.head_width):
        return f"is {at}, a layer whose keys have another shape"
    return None

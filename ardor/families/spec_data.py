"""A spec as plain data, which JSON and YAML hold, and back: strictly, with the place of an error.

Every value is a mapping of its fields. Where a field may hold one of several things, `kind` says
which. Equal layers may be written once with `repeat`, and a pattern of them as `layers` within.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ardor.arch.spec import (
    Attention,
    Decoder,
    DynamicScaling,
    Experts,
    LatentAttention,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Mlp,
    ProportionalScaling,
    YarnScaling,
)
from ardor.errors import ConfigError
from ardor.families.contradictions import contradictions

KINDS: dict[str, type] = {
    "attention": Attention,
    "latent_attention": LatentAttention,
    "mlp": Mlp,
    "experts": Experts,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "long": LongScaling,
    "proportional": ProportionalScaling,
}
_KIND_OF = {kind: name for name, kind in KINDS.items()}
LONGEST_PATTERN = 12  # layers


def to_data(spec: Decoder) -> dict[str, Any]:
    """`spec` as mappings, lists and scalars; an absent part that is absent by default is left out.

    Everything else is written, so that a default that changes later changes no file.
    """
    return _written(spec)


def _written(value: Any) -> Any:
    if is_dataclass(value):
        kind = _KIND_OF.get(type(value))
        found: dict[str, Any] = {} if kind is None else {"kind": kind}
        for field in fields(value):
            held = getattr(value, field.name)
            if held is None and field.default is None:
                continue
            is_stack = isinstance(value, Decoder) and field.name == "layers"
            found[field.name] = _stack(held) if is_stack else _written(held)
        return found
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return value


def _stack(layers: Sequence[Layer]) -> list[Any]:
    """The layers, with equal ones that follow each other, or their shortest pattern, only once."""
    count = len(layers)
    for period in range(2, min(LONGEST_PATTERN, count // 2) + 1):
        repeats = all(layer == layers[i % period] for i, layer in enumerate(layers))
        if count % period == 0 and repeats and len({*layers}) > 1:
            return [{"repeat": count // period, "layers": _runs(layers[:period])}]
    return _runs(layers)


def _runs(layers: Sequence[Layer]) -> list[Any]:
    runs = [(layer, len([*equal])) for layer, equal in groupby(layers)]
    return [{"repeat": n, **_written(layer)} if n > 1 else _written(layer) for layer, n in runs]


def from_data(data: Any, where: str, defaults: Mapping[str, Any] | None = None) -> Decoder:
    """The spec that `data` describes; `defaults` stand in for fields of the decoder.

    Some fields may be left out, and follow from others: kv_heads (heads), head_width (width /
    heads), scale (1 / sqrt of a query's channels), rotated (head_width), a layer's norm (the
    decoder's).

    Raises: ConfigError naming the place in the file for an unknown or missing key, a value of
    another type, and whatever contradicts itself.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: found {_type(data)}, expected a mapping of a decoder's fields")
    return _Reader(where).decoder({**(defaults or {}), **data})


class _Reader:
    def __init__(self, where: str):
        self.where = where

    def error(self, path: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {path + ' ' if path else ''}{why}")

    def decoder(self, data: Mapping[str, Any]) -> Decoder:
        self.known(Decoder, data, "")
        for name in ("width", "layers"):
            if name not in data:
                raise self.missing(Decoder, name, "")
        self.scalar(int, data["width"], "width")  # first, as widths of heads follow from it
        expanded = tuple(self.layers(data["layers"], "layers", data))
        return self.build(Decoder, data, "", {"layers": expanded})

    def layers(self, value: Any, path: str, decoder: Mapping[str, Any]) -> Iterator[Layer]:
        if not isinstance(value, list) or not value:
            raise self.error(path, f"is {_shown(value)}, expected a list with at least one layer")
        for index, entry in enumerate(value):
            place = f"{path}[{index}]"
            if not isinstance(entry, Mapping):
                raise self.error(place, f"is {_shown(entry)}, expected a mapping of a layer")
            left = dict(entry)
            repeat = left.pop("repeat", 1)
            if type(repeat) is not int or repeat < 1:
                raise self.error(
                    f"{place}.repeat", f"is {repeat!r}, expected a whole number above 0"
                )
            if "layers" in left:
                inner = tuple(self.layers(left.pop("layers"), f"{place}.layers", decoder))
                if left:
                    raise self.error(place, f"has {', '.join(left)} beside layers, which says all")
            else:
                inner = (self.layer(left, place, decoder),)
            yield from inner * repeat

    def layer(self, data: dict[str, Any], path: str, decoder: Mapping[str, Any]) -> Layer:
        if "norm" not in data and decoder.get("norm") is not None:
            data = {**data, "norm": decoder["norm"]}
        mixer, width = data.get("mixer"), decoder.get("width")
        if isinstance(mixer, Mapping) and mixer.get("kind") == "attention":
            data = {**data, "mixer": _with_widths(mixer, width)}
        elif isinstance(mixer, Mapping) and mixer.get("kind") == "latent_attention":
            data = {**data, "mixer": _with_scale(mixer)}
        self.known(Layer, data, path, also=("repeat", "layers"))
        return self.build(Layer, data, path)

    def build(
        self, kind: type, data: Mapping[str, Any], path: str, made: Mapping[str, Any] | None = None
    ) -> Any:
        """A value of the dataclass `kind`, whose keys are known; `made` are read already."""
        hints, values = get_type_hints(kind), dict(made or {})
        for field in fields(kind):
            place = f"{path}.{field.name}" if path else field.name
            if field.name in values:
                continue
            if field.name in data:
                values[field.name] = self.value(hints[field.name], data[field.name], place)
            elif field.default is MISSING:
                raise self.missing(kind, field.name, path)
        built = kind(**values)
        for name, why in contradictions(built):
            raise self.error(f"{path}.{name}" if path else name, why)
        return built

    def value(self, hint: Any, value: Any, path: str) -> Any:
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        if all(is_dataclass(option) for option in options):
            return self.mapping(options, value, path)
        (only,) = options
        if get_origin(only) is Literal:
            if type(value) is str and value in get_args(only):
                return value
            raise self.error(path, f"is {_shown(value)}, expected {' | '.join(get_args(only))}")
        if get_origin(only) is tuple:
            if not isinstance(value, list):
                raise self.error(path, f"is {_shown(value)}, expected a list")
            inside = get_args(only)[0]
            return tuple(self.value(inside, item, f"{path}[{i}]") for i, item in enumerate(value))
        return self.scalar(only, value, path)

    def scalar(self, kind: type, value: Any, path: str) -> Any:
        if kind is float:
            if type(value) not in (int, float):
                raise self.error(path, f"is {_shown(value)}, expected a number")
            return float(value)
        if type(value) is not kind:
            word = {int: "a whole number", bool: "true or false"}[kind]
            raise self.error(path, f"is {_shown(value)}, expected {word}")
        return value

    def mapping(self, options: Sequence[type], value: Any, path: str) -> Any:
        names = [_KIND_OF[option] for option in options if option in _KIND_OF]
        if not isinstance(value, Mapping):
            what = f"a mapping with kind: {' | '.join(names)}" if names else "a mapping"
            raise self.error(path, f"is {_shown(value)}, expected {what}")
        if not names:
            self.known(options[0], value, path)
            return self.build(options[0], value, path)
        name = value.get("kind", names[0] if len(names) == 1 else None)
        if name not in names:
            found = f"kind {name!r}" if "kind" in value else "no kind"
            raise self.error(path, f"has {found}, expected kind: {' | '.join(names)}")
        kind, rest = KINDS[name], {k: v for k, v in value.items() if k != "kind"}
        self.known(kind, rest, path, also=("kind",))
        return self.build(kind, rest, path)

    def known(
        self, kind: type, data: Mapping[Any, Any], path: str, also: tuple[str, ...] = ()
    ) -> None:
        names = [field.name for field in fields(kind)]
        for key in data:
            if key not in names:
                choices = [*names, *also]
                near = difflib.get_close_matches(str(key), choices, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices)}"
                place = f"{path}.{key}" if path else str(key)
                raise self.error(place, f"is not known; {hint}")

    def missing(self, kind: type, name: str, path: str) -> ConfigError:
        why = f"has no {name!r}" if path else f"there is no {name!r}"
        optional = type(None) in get_args(get_type_hints(kind)[name])
        return self.error(path, why + ("; null says that there is none" if optional else ""))


def _with_widths(mixer: Mapping[str, Any], width: Any) -> dict[str, Any]:
    """Attention with what may be left out; where the numbers are none, their own check says so."""
    found, heads = dict(mixer), mixer.get("heads")
    if type(heads) is int and heads > 0:
        found.setdefault("kv_heads", heads)
        if type(width) is int and width % heads == 0:
            found.setdefault("head_width", width // heads)
    head_width = found.get("head_width")
    if type(head_width) is int and head_width > 0:
        found.setdefault("scale", head_width**-0.5)
        if isinstance(found.get("rope"), Mapping):
            found["rope"] = {"rotated": head_width, **found["rope"]}
    return found


def _with_scale(mixer: Mapping[str, Any]) -> dict[str, Any]:
    rope, plain = mixer.get("rope"), mixer.get("plain_width")
    turning = rope.get("rotated") if isinstance(rope, Mapping) else None
    if type(plain) is int and type(turning) is int and plain + turning > 0:
        return {"scale": (plain + turning) ** -0.5, **mixer}
    return dict(mixer)


def _shown(value: Any) -> str:
    return _type(value) if isinstance(value, Mapping | list) else repr(value)


def _type(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), repr(value))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two specs differ, as "layers[0].mixer.heads: 2, now 4"."""
    if is_dataclass(old) and type(old) is type(new):
        pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in fields(old)]
        inside = [(f"{path}.{name}" if path else name, a, b) for name, a, b in pairs]
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        inside = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    elif isinstance(old, tuple) and isinstance(new, tuple):
        return [f"{path}: {len(old)} of them, now {len(new)}"]
    else:
        return [] if old == new else [f"{path}: {_brief(old)}, now {_brief(new)}"]
    return [found for name, a, b in inside for found in differences(a, b, name)]


def _brief(value: Any) -> str:
    return type(value).__name__ if is_dataclass(value) else repr(value)

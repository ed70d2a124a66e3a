"""Tensor names as a table: which module of theirs holds which of ours, for any spec.

The modules of a spec and their parameters are those that `arch` makes of it; a test says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ardor.arch.spec import Attention, Decoder, Experts, LatentAttention, Layer, Mlp, Norm
from ardor.families.rules import Either, Ignorable, Rule, Rules, Stack

_value = dataclass(frozen=True, slots=True)

# How the rows of a joined module are laid out: part after part; or a share of each part, head by
# head, kv head by kv head, or output by output.
Order = Literal["parts", "heads", "kv_heads", "rows"]


@_value
class Bare:
    """A parameter of theirs, outside of any module, that is the weight of a module of ours."""

    name: str


@_value
class Joined:
    """Several modules of ours in one of theirs."""

    name: str
    order: Order = "parts"


@_value
class PerExpert:
    """Modules of theirs, one for each expert, that are one of ours; {} stands for the number."""

    name: str


@_value
class AllExperts:
    """One tensor of theirs that holds a map of all experts (joined: several maps), [E, out, in].

    It is a bare parameter: the bias has a name of its own.
    """

    name: str
    order: Order = "parts"
    transposed: bool = False  # [E, in, out]
    bias: str = "_bias"  # added to the name


@_value
class PackedExperts:
    """A map of all experts as blocks of small numbers, each block with a scale (MXFP4).

    `name`_blocks is [E, out, blocks, bytes] and `name`_scales [E, out, blocks]; `name`_bias.
    """

    name: str
    order: Order = "parts"


@_value
class Apart:
    """A place of its own for each of several modules of ours: the alternative to a joined one."""

    places: tuple["Place", ...]


Place = str | Bare | Joined | PerExpert | AllExperts | PackedExperts | Apart
Table = Mapping[str | tuple[str, ...], Place | tuple[Place, ...]]
"""Our module (or several that are joined, or a bare parameter) -> its place under theirs.

A tuple of places: checkpoints differ; the first is how transformers saves. Several keys may cover
a module in different ways (joined and alone): the one whose modules all exist and whose file is
there counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    layer: str  # of layer {} of theirs, with the dot at its end
    modules: Table  # within a layer
    outside: Mapping[str, str | tuple[str, ...]]  # beside the layers
    prefix: str = ""  # in front of most names; checkpoints of the bare body lack it
    aliases: tuple[str, ...] = ()  # prefixes that checkpoints have instead
    transposed: bool = False  # linear weights in layers are [in, out]
    ignorable: tuple[Ignorable, ...] = ()

    def rules(self, spec: Decoder) -> Rules:
        """Where each tensor of `spec` is in a checkpoint."""
        found: list[Rule | Stack | Either] = []
        outside = outside_modules(spec)
        for name, module in outside.items():
            if name not in ("norm", "embed_out_proj", "lm_head"):
                found += self._outside(name, module)
        for index, layer in enumerate(spec.layers):
            found += self._layer(index, layer, spec)
        for name in ("norm", "embed_out_proj", "lm_head"):
            if name in outside:
                found += self._outside(name, outside[name])
        tied = Rule(f"{_options(self.outside['lm_head'])[0]}.weight", ("embed_tokens.weight",))
        return Rules(
            rules=tuple(found),
            prefix=self.prefix,
            aliases=self.aliases,
            tied_head=tied if spec.tied else None,
            ignorable=self.ignorable,
        )

    def _outside(self, name: str, module: "Module") -> Iterator[Rule | Either]:
        options = _options(self.outside[name])
        ways = tuple(tuple(_alone(place, name, module, False)) for place in options)
        if len(ways) > 1:
            yield Either(ways)
        else:
            yield from ways[0]

    def _layer(self, index: int, layer: Layer, spec: Decoder) -> Iterator[Rule | Stack | Either]:
        theirs, ours = self.layer.format(index), f"layers.{index}."
        modules = layer_modules(layer, spec)
        covered: set[str] = set()
        for key, places in self.modules.items():
            members = (key,) if isinstance(key, str) else key
            if not modules.keys() >= {*members} or covered & {*members}:
                continue
            covered |= {*members}
            joined = {f"{ours}{name}": modules[name] for name in members}
            options = places if isinstance(places, tuple) else (places,)
            ways = tuple(tuple(self._place(p, theirs, joined, layer)) for p in options)
            if len(ways) > 1:
                yield Either(ways)
            else:
                yield from ways[0]
        assert covered == modules.keys(), f"no names for {sorted(modules.keys() - covered)}"

    def _place(
        self, place: Place, theirs: str, members: "Mapping[str, Module]", layer: Layer
    ) -> Iterator[Rule | Stack]:
        first = next(iter(members.values()))
        names = tuple(members)
        if isinstance(place, Apart):
            for (name, module), own in zip(members.items(), place.places, strict=True):
                yield from self._place(own, theirs, {name: module}, layer)
            return
        if isinstance(place, str):
            transposed = self.transposed and first.outputs is not None
            yield from _alone(theirs + place, names[0], first, transposed)
            return
        parameters = [p for p in ("weight", "bias") if getattr(first, p)]
        outputs = tuple(module.outputs or 0 for module in members.values())
        disk = theirs + place.name
        for parameter in parameters:
            memory = tuple(f"{name}.{parameter}" for name in names)
            match place:
                case Bare():
                    yield Rule(disk, memory)
                case PerExpert():
                    assert first.experts is not None
                    numbered = (disk.format(e) for e in range(first.experts))
                    yield Stack(tuple(f"{name}.{parameter}" for name in numbered), memory[0])
                case AllExperts():
                    yield Rule(
                        disk if parameter == "weight" else disk + place.bias,
                        memory,
                        transposed=place.transposed and parameter == "weight",
                        sizes=outputs,
                        groups=_groups(place.order, layer, outputs),
                        axis=1,
                    )
                case PackedExperts():
                    for kind in ("blocks", "scales") if parameter == "weight" else ("bias",):
                        yield Rule(
                            f"{disk}_{kind}",
                            tuple(f"{name}.{kind}" for name in names),
                            sizes=outputs,
                            groups=_groups(place.order, layer, outputs),
                            axis=1,
                        )
                case Joined():
                    yield Rule(
                        f"{disk}.{parameter}",
                        memory,
                        transposed=self.transposed and parameter == "weight",
                        sizes=outputs,
                        groups=_groups(place.order, layer, outputs),
                    )


class Module(NamedTuple):
    """A module of ours: its parameters, and how many rows its weight has if it is a linear map."""

    outputs: int | None = None
    weight: bool = True
    bias: bool = False
    experts: int | None = None
    bare: bool = False  # a parameter, not a module


def outside_modules(spec: Decoder) -> dict[str, Module]:
    """The modules beside the layers, by name."""
    found = {"embed_tokens": Module()}
    if spec.embed_width is not None:
        found["embed_in_proj"] = Module(spec.width)
    if (inputs := spec.token_input) is not None:
        found["token_inputs.embed"] = Module()
        found["token_inputs.context_proj"] = Module(len(spec.layers) * inputs.width)
        found["token_inputs.context_norm"] = _norm(inputs.norm)
    if spec.learned_positions:
        found["embed_positions"] = Module()
    if spec.embed_norm is not None:
        found["embed_norm"] = _norm(spec.embed_norm)
    if spec.norm is not None:
        found["norm"] = _norm(spec.norm)
    if spec.embed_width is not None:
        found["embed_out_proj"] = Module(spec.embed_width)
    if not spec.tied:
        found["lm_head"] = Module(spec.vocab, bias=spec.head_bias)
    return {name: module for name, module in found.items() if module.weight or module.bias}


def layer_modules(layer: Layer, spec: Decoder) -> dict[str, Module]:
    """The modules of one layer, by their names within it; those without parameters left out."""
    width = spec.width
    placement, norm = layer.placement, _norm(layer.norm)
    reads = placement not in ("post", "after")
    writes = placement in ("post", "sandwich", "after")
    normed = isinstance(layer.ffn, Experts) and layer.ffn.norm is not None
    norms = {
        "mixer_norm": reads,
        "mixer_out_norm": writes,
        "ffn_norm": reads and placement != "parallel" and not normed,
        "ffn_out_norm": writes,
    }
    found = {name: norm for name, wanted in norms.items() if wanted}
    if isinstance(layer.mixer, LatentAttention):
        found |= _latent(layer.mixer, width)
    else:
        found |= _attention(layer.mixer, width)
    if isinstance(layer.ffn, Experts):
        found |= _experts(layer.ffn, width)
    else:
        found |= _mlp("ffn", layer.ffn, width)
    if (inputs := spec.token_input) is not None:
        found["token_gate.gate_proj"] = Module(inputs.width)
        found["token_gate.out_proj"] = Module(width)
        found["token_gate.out_norm"] = _norm(inputs.norm)
    if layer.scalar:
        found["scalar"] = Module(bare=True)
    return {name: module for name, module in found.items() if module.weight or module.bias}


def _norm(norm: Norm) -> Module:
    return Module(weight=norm.weight != "none", bias=norm.bias)


def _attention(mixer: Attention, width: int) -> dict[str, Module]:
    inner, shared = mixer.heads * mixer.head_width, mixer.kv_heads * mixer.head_width
    found = {
        "mixer.q_proj": Module(inner, bias=mixer.qkv_bias),
        "mixer.k_proj": Module(shared, bias=mixer.qkv_bias),
        "mixer.v_proj": Module(shared, bias=mixer.qkv_bias),
        "mixer.o_proj": Module(width, bias=mixer.out_bias),
    }
    if (qk := mixer.qk_norm) is not None:
        norm = Module(experts=mixer.heads) if qk.over == "heads" else _norm(qk.norm)
        shared = Module(experts=mixer.kv_heads) if qk.over == "heads" else norm
        found |= {"mixer.q_norm": norm, "mixer.k_norm": shared}
    if mixer.value_norm is not None:
        found["mixer.v_norm"] = _norm(mixer.value_norm)
    if mixer.kv_layer is not None:
        found = {
            name: found[name] for name in found if not name.startswith(("mixer.k_", "mixer.v_"))
        }
    elif mixer.values_from_keys:
        del found["mixer.v_proj"]
    if mixer.sinks:
        found["mixer.sinks"] = Module(bare=True)
    return found


def _latent(mixer: LatentAttention, width: int) -> dict[str, Module]:
    turning, H = mixer.rope.rotated, mixer.heads
    queries = H * (mixer.plain_width + turning)
    found = {"mixer.q_proj": Module(queries)}
    if mixer.query_rank is not None:
        found = {
            "mixer.q_down_proj": Module(mixer.query_rank, bias=mixer.bias),
            "mixer.q_norm": _norm(mixer.norm),
            "mixer.q_up_proj": Module(queries),
        }
    return found | {
        "mixer.kv_down_proj": Module(mixer.kv_rank + turning, bias=mixer.bias),
        "mixer.kv_norm": _norm(mixer.norm),
        "mixer.kv_up_proj": Module(H * (mixer.plain_width + mixer.value_width)),
        "mixer.o_proj": Module(width, bias=mixer.bias),
    }


def _mlp(name: str, mlp: Mlp, width: int, experts: int | None = None) -> dict[str, Module]:
    inner = Module(mlp.width, bias=mlp.bias, experts=experts)
    gate = {f"{name}.gate_proj": inner} if mlp.gated else {}
    down = Module(width, bias=mlp.bias, experts=experts)
    return gate | {f"{name}.up_proj": inner, f"{name}.down_proj": down}


def _experts(ffn: Experts, width: int) -> dict[str, Module]:
    # The router's weight is no map that an adapter can name, so it counts no outputs.
    found = {"ffn.router": Module(bias=ffn.router.bias)}
    if ffn.router.correction:
        found["ffn.router.correction"] = Module(bare=True)
    if ffn.router.norm is not None:
        found["ffn.router.norm"] = _norm(ffn.router.norm)
    if ffn.router.expert_scale:
        found["ffn.router.expert_scale"] = Module(bare=True)
    if ffn.norm is not None:
        ends = ("in_norm", "out_norm")
        ends += ("shared_in_norm", "shared_out_norm") if ffn.shared is not None else ()
        found |= {f"ffn.{end}": _norm(ffn.norm) for end in ends}
    found |= _mlp("ffn.experts", ffn.expert, width, ffn.count)
    if ffn.shared is not None:
        found |= _mlp("ffn.shared", ffn.shared, width)
    if ffn.shared_gated:
        found["ffn.shared_gate"] = Module(1)
    return found


def _options(places: str | tuple[str, ...]) -> tuple[str, ...]:
    return places if isinstance(places, tuple) else (places,)


def _alone(disk: str, memory: str, module: Module, transposed: bool) -> Iterator[Rule]:
    """The rules of one module that is one of theirs, too."""
    if module.bare:
        yield Rule(disk, (memory,))
        return
    if module.weight:
        yield Rule(f"{disk}.weight", (f"{memory}.weight",), transposed)
    if module.bias:
        yield Rule(f"{disk}.bias", (f"{memory}.bias",))


def _groups(order: Order, layer: Layer, outputs: tuple[int, ...]) -> int:
    if order == "parts":
        return 1
    if order == "rows":
        return outputs[0]
    mixer = layer.mixer
    assert isinstance(mixer, Attention)
    return mixer.heads if order == "heads" else mixer.kv_heads

"""Where A and B begin. What each beginning promises about s B A is said beside it.

Ways that begin at a part of W (PiSSA, OLoRA) leave W as it is: the part is taken off by a second,
frozen pair A0, B0, so that y = W x + s (B A - B0 A0) x. PEFT takes it off W, with one more rounding
to W's dtype; the gradients of A and B are the same, the base stays what is on disk, and the adapter
is a plain one of rank 2r for whoever has that base.

Axes: R adapter rank.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ardor.adapters.config import LoraConfig
from ardor.arch.experts import ExpertLinear
from ardor.arch.linear import Linear
from ardor.errors import ConfigError

OFF_BASE = ("pissa", "olora")  # beginnings that take a part of W


class Start(NamedTuple):
    """A and B of one map in float32, and whether what they begin with is taken off again."""

    a: Float32[Tensor, "R in"]
    b: Float32[Tensor, "out R"]
    offset: bool = False


@dataclass(frozen=True)
class Sources:
    """What some beginnings need beside the map itself, by our names of the maps."""

    originals: Callable[[str], Tensor] | None = None  # the full weight of a quantized map: LoftQ
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # principal directions: EVA


def dense_weight(base: nn.Module, dtype: torch.dtype = torch.float32) -> Float[Tensor, "... in"]:
    """The weight of a linear map, or of all experts', expanded if it is packed.

    Raises: ConfigError for a module that has none.
    """
    dequantized: Any = getattr(base, "dequantized", None)  # of whatever format
    if dequantized is not None:
        return dequantized(dtype)
    if is_packed(base):  # such as GPT-2's linear in a model that transformers runs
        raise ConfigError(f"a {type(base).__name__} cannot say what its weight is, [out, in]")
    return base.get_parameter("weight").detach().to(dtype)


def is_packed(base: nn.Module) -> bool:
    """Whether the weight is held in a quantized format: told by the type, never by a dtype."""
    return hasattr(base, "dequantized") or not isinstance(base, Linear | nn.Linear | ExpertLinear)


def starts(
    name: str, base: nn.Module, r: int, scale: float, config: LoraConfig, sources: Sources
) -> Callable[[torch.Generator | None], list[Start]]:
    """What draws the beginning of the map `name`: one of a linear, or one of each expert.

    Raises: ConfigError if this beginning cannot be had for this map.
    """
    kind = config.init_lora_weights
    count: Any = getattr(base, "count", None)
    if kind.startswith(OFF_BASE) and is_packed(base):
        raise ConfigError(
            f"init_lora_weights={kind} takes a part of the full weight, but {name} is held packed "
            f"({type(base).__name__}); begin with loftq, or train with method lora on the full "
            "weights"
        )
    if kind == "loftq" and (sources.originals is None or not is_packed(base)):
        raise ConfigError(
            f"init_lora_weights=loftq makes up for what quantization lost, but {name} is not "
            "quantized here; use it with method qlora on a checkpoint of full weights"
        )
    if kind == "eva" and (name not in sources.inputs or count is not None):
        raise ConfigError(
            f"init_lora_weights=eva needs the inputs of {name}, which "
            + ("experts share unevenly" if count is not None else "were not recorded")
            + "; leave it out of target_modules, or begin with default"
        )
    if kind == "orthogonal" and r % 2:
        raise ConfigError(f"init_lora_weights=orthogonal needs an even rank, found {r} for {name}")

    def draw(generator: torch.Generator | None) -> list[Start]:
        weights: Iterable[Any] = [None] * (count or 1)
        if kind == "loftq":
            assert sources.originals is not None
            lost = sources.originals(name).to(device_of(base)).float() - dense_weight(base)
            weights = lost if count else [lost]
        elif kind.startswith(OFF_BASE):
            whole = dense_weight(base)
            weights = whole if count else [whole]
        sizes = cast("tuple[int, int]", (base.inputs, base.outputs))
        return [
            _start(kind, sizes, r, scale, generator, weight, sources.inputs.get(name))
            for weight in weights
        ]

    return draw


def begin_at(kind: str, weight: Float32[Tensor, "out in"], r: int, scale: float) -> Start:
    """The beginning, without chance, that takes a part of `weight`."""
    sizes = (weight.shape[1], weight.shape[0])
    return _start(kind, sizes, r, scale, None, weight, None)


def _start(
    kind: str,
    sizes: tuple[int, int],
    r: int,
    scale: float,
    generator: torch.Generator | None,
    weight: Tensor | None,
    inputs: Tensor | None,
) -> Start:
    if kind == "pissa":
        assert weight is not None
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return _principal(u, s, vh, r, scale, offset=True)
    if kind.startswith("pissa_niter_"):
        assert weight is not None
        parts = _iterated(weight, r, int(kind.rsplit("_", 1)[1]), generator)
        return _principal(*parts, r, scale, offset=True)
    if kind == "olora":
        # s B A = s Q R is taken off, whatever s: Büyükakyüz 2024, arXiv:2406.01775.
        assert weight is not None
        q, upper = torch.linalg.qr(weight)
        return Start(upper[:r].contiguous(), q[:, :r].contiguous(), offset=True)
    if kind == "loftq":
        # One step of LoftQ, so that the base stays what quantization makes of it; s B A is the
        # best that a rank r can do about W - Q, so never worse than 0. Li et al. 2023,
        # arXiv:2310.08659; PEFT 0.21 leaves s out (peft#1982).
        assert weight is not None
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return _principal(u, s, vh, r, scale, offset=False)
    if kind == "orthogonal":
        return _orthogonal(sizes, r, generator)
    a = torch.empty(r, sizes[0], device=drawing_device(generator))
    if kind == "eva":
        assert inputs is not None
        a = inputs[:r].float()
    elif kind == "gaussian":
        a.normal_(std=1 / r, generator=generator)
    else:
        bound = 1 / math.sqrt(sizes[0])  # Kaiming-uniform with a = sqrt(5)
        a.uniform_(-bound, bound, generator=generator)
    return Start(a, torch.zeros(sizes[1], r, device=a.device))  # B = 0: the model is as it was


def _principal(u: Tensor, s: Tensor, vh: Tensor, r: int, scale: float, *, offset: bool) -> Start:
    """s B A is the best approximation of rank r: Meng et al. 2024 (PiSSA), arXiv:2404.02948."""
    root = (s[:r] / scale).sqrt()
    return Start(root[:, None] * vh[:r], u[:, :r] * root, offset)


def _iterated(
    weight: Tensor, r: int, rounds: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular triples, nearly. Source: Halko et al. 2009, arXiv:0909.4061, alg. 5.1"""
    drawn = torch.empty(weight.shape[1], r, device=drawing_device(generator)).normal_(
        generator=generator
    )
    q = torch.linalg.qr(weight @ drawn.to(weight.device)).Q
    for _ in range(rounds):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vh


def _orthogonal(sizes: tuple[int, int], r: int, generator: torch.Generator | None) -> Start:
    """A and B from the odd and even rows of one orthogonal matrix: B A = 0, and neither is 0.

    Source: datta0.github.io/posts/rethink-lora-init, as PEFT 0.21 has it.
    """

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, device=drawing_device(generator)).normal_(generator=generator)

    # In float64: the product is then 0 to float32's last bit.
    q = torch.linalg.qr(normal(r, r).double()).Q
    a = (normal(sizes[0], r // 2).double() @ q[0::2]).T / 10
    b = (normal(sizes[1], r // 2).double() @ q[1::2]) / 10
    return Start(a.float().contiguous(), b.float())


@torch.no_grad()
def principal_inputs(
    decoder: nn.Module, ranks: Mapping[str, int], batches: Iterable[Callable[[], object]]
) -> dict[str, Float32[Tensor, "R in"]]:
    """The r directions in which most of each map's inputs lie, over the forward passes `batches`.

    Exact while twice the rank, or 64, covers the inputs' rank; beyond, what has least is dropped
    batch by batch.

    Raises: ConfigError if there are fewer positions than directions.
    Source: Paischer et al. 2024 (EVA), arXiv:2410.07170, without redistributing ranks (rho = 1).
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            held = torch.cat([found[name], rows]) if name in found else rows
            _, s, vh = torch.linalg.svd(held, full_matrices=False)
            kept = max(2 * ranks[name], 64)
            found[name] = s[:kept, None] * vh[:kept]

        return hook

    hooks = [decoder.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ranks]
    try:
        for run in batches:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, r in ranks.items():
        if len(found.get(name, ())) < r:
            raise ConfigError(
                f"init_lora_weights=eva needs {r} positions for the rank {r} of {name}, found "
                f"{len(found.get(name, ()))}; give more data, or a lower rank"
            )
    return {
        name: torch.nn.functional.normalize(found[name][:r], dim=1) for name, r in ranks.items()
    }


def drawing_device(generator: torch.Generator | None) -> torch.device | str:
    """Drawn where the generator lives, so that a seed means the same on every device."""
    return "cpu" if generator is None else generator.device


def device_of(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers()])).device

"""A causal language model of transformers behind the surface of our own.

Documents of equal length are run as one batch and others apart, so that no padding reaches code
that may treat it in its own way; in cached decoding every row has a state of its own.

Axes: B batch rows, T new positions, V vocabulary.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ardor.arch.causal import CausalLM
from ardor.arch.experts import Routing
from ardor.arch.layout import Layout, Packed
from ardor.errors import ArdorError, ConfigError, ShapeError

FOREIGN = "foreign"
# How a forward of transformers takes and returns what it has read: keys and values, or a state.
_KEYS_AND_VALUES = ("cache", "past_key_values")  # since transformers 5.24, and before
STATES = (*_KEYS_AND_VALUES, "cache_params", "state")
UNLIMITED = 1 << 30  # positions, where a config names no limit
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_LIMITS += ("seq_length", "n_ctx", "context_length", "model_max_length")
PROBE = 6  # positions; enough to see a leak or a lost position
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest logit; else:
COARSE = 3e-2


@dataclass(frozen=True)
class ForeignFacts:
    """What a foreign config says of itself; its routers' losses are left out of training."""

    vocab: int
    max_positions: int
    balance: float = 0.0


@dataclass
class _Slot:
    """What a row has read: as the model keeps it, and as ids."""

    state: Any = None
    read: Tensor | None = None


class ForeignCache:
    """A cache of rows that each hold a state of the foreign model, of any length and kind."""

    def __init__(self, slots: list[_Slot]):
        self.slots = slots
        self.past = [0] * len(slots)

    def stale(self, new: int) -> list[int]:
        """None: what a foreign model keeps is its own affair."""
        return []

    def advance(self, new: int) -> None:
        """Count `new` positions as read in every row."""
        self.past = [n + new for n in self.past]

    def row(self, index: int) -> "ForeignCache":
        """One row as a cache of its own that shares its state, but not its `past`."""
        view = ForeignCache([self.slots[index]])
        view.past = [self.past[index]]
        return view

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`, in that order."""
        self.past = [self.past[r] for r in rows]
        self.slots = [self.slots[r] for r in rows]


class Foreign(CausalLM):
    """`foreign`, a causal language model of transformers, with Decoder's surface.

    `hidden` is the logits themselves and `head` the identity: code that is not ours may do anything
    between its last layer and its logits. So the loss holds the logits of a whole micro-batch, and
    generating those of a whole prompt.
    Activations have the dtype of the weights; another `compute` is torch's autocast. In training
    the dropout of the model's own config acts, as it does in transformers.

    Nothing is run when it is made: what code keeps from its first call stays on the device of that
    call. `verify` runs it first, once it is where it will stay.

    Raises: ConfigError if neither config nor code says how many token ids there are.
    """

    foreign: Any

    def __init__(self, foreign: Any):
        super().__init__()
        self.foreign = foreign.eval()
        self.compute = self.stored = next(
            p.dtype for p in foreign.parameters() if p.is_floating_point()
        )
        self._head = _head_name(foreign)
        self._takes = _parameters(foreign.forward)
        self._reading: _Reading | None = None
        self._reading_chosen = False  # when the first cache is made
        _mark_linears(foreign)
        config = foreign.config.get_text_config()
        self._facts = ForeignFacts(_vocab(foreign, config), _limit(config))
        self._probe = (torch.arange(1, PROBE + 1) % self._facts.vocab)[None]
        self._restless = False  # whether its code writes to its weights

    @property
    def facts(self) -> ForeignFacts:
        return self._facts

    def verify(self) -> None:
        """Run a few tokens.

        Raises: ConfigError if the code fails, gives NaN, or lets a position depend on later ones.
        """
        versions = self._versions()
        try:
            causal = self._causal()
        except ArdorError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{type(self.foreign).__name__} cannot be run by transformers: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._restless = self._versions() != versions
        if not causal:
            raise ConfigError(
                f"{type(self.foreign).__name__} is no causal language model as it is configured: "
                "what it says after a token depends on later tokens (for BERT and its kin "
                "is_decoder must be true in config.json)"
            )

    def place_of(self, name: str) -> Literal["layers", "head"] | None:
        """See `ardor.arch.linear.place_of`. A head tied to the embedding is neither."""
        if not name.startswith(f"{FOREIGN}."):
            return None
        if name == self._head:
            return None if self._tied() else "head"
        return "layers"

    def new_cache(self, *, rows: int, capacity: int) -> ForeignCache:
        """An empty cache; `capacity` limits nothing here, as states grow by themselves."""
        if not self._reading_chosen:
            self._reading, self._reading_chosen = self._choose_reading(), True
        return ForeignCache([_Slot() for _ in range(rows)])

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        layout: Layout | None = None,
        cache: ForeignCache | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """The logits after every position, in the dtype of the model.

        Raises: ShapeError if the layout does not fit the tokens; ConfigError if the model's code
        reaches into a linear that an adapter or quantization has replaced.
        """
        if cache is not None:
            rows = zip(tokens.split(1), cache.past, cache.slots, strict=True)
            reading = self._reading
            return torch.cat([self._continued(*row, reading) for row in rows])
        B, T = tokens.shape
        layout = Packed.whole(B, T) if layout is None else layout
        assert isinstance(layout, Packed)
        if layout.positions(torch.device("cpu")).shape != tokens.shape:
            raise ShapeError(
                f"layout of {layout.lengths} does not fit tokens {tuple(tokens.shape)}"
            )
        flat = tokens.flatten()
        found = [
            self._logits(flat[start : start + count * length].view(count, length)).flatten(0, 1)
            for start, count, length in layout.runs
        ]
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.view(B, T, -1)

    def head(self, hidden: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """The same: see the class."""
        return hidden

    def head_parts(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The identity, without parameters."""
        return self.head, ()

    def settle(self) -> None:
        """Have the weights as files have them.

        Some code (RWKV's) changes its weights for evaluation, in the first call after `eval`, and
        back in the first after `train`.
        """
        if not self._restless:
            return
        before = self.training
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():  # dropout draws, and is undone
            self.train()
            self._logits(self._probe.to(self.device))
        self.train(before)

    def modules_on_disk(self) -> Iterator[tuple[str, str, bool]]:
        """(our name, transformers' name, whether its weight is transposed) of every module."""
        for name, module in self.foreign.named_modules():
            if name:
                yield f"{FOREIGN}.{name}", name, _is_conv1d(module)

    # --- calls into the foreign code ---

    def _logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        return _logits_of(self._call(ids, {"use_cache": False}))

    def _call(self, ids: Int[Tensor, "B T"], given: Mapping[str, Any]) -> Any:
        taken = {key: value for key, value in given.items() if key in self._takes}
        grad = torch.is_grad_enabled()
        with ExitStack() as stack:
            # Never in inference mode: what the code computes once and keeps (a table of rotations)
            # could then not be used in training.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
            if self.compute != self.stored:
                stack.enter_context(torch.autocast(ids.device.type, self.compute))
            try:
                return self.foreign(input_ids=ids.clone(), **taken)
            except AttributeError as error:
                replaced = type(error.obj).__name__
                if replaced not in ("LoraLinear", "QuantizedLinear"):
                    raise
                names = (name for name, module in self.named_modules() if module is error.obj)
                raise ConfigError(
                    f"the code of {type(self.foreign).__name__} reads {error.name!r} of "
                    f"{next(names).removeprefix(f'{FOREIGN}.')}, which is a {replaced} now; name "
                    "target_modules without it, and leave quantization out"
                ) from error

    def _continued(
        self, ids: Int[Tensor, "1 T"], past: int, slot: _Slot, reading: "_Reading | None"
    ) -> Float[Tensor, "1 T V"]:
        """The logits of `ids` after the `past` positions that `slot` has read."""
        before = None if past == 0 else slot.read
        slot.read = ids if before is None else torch.cat([before, ids], 1)
        if reading is None:
            return self._logits(slot.read)[:, past:]
        total = slot.read.shape[1]
        given = {
            "use_cache": True,
            reading.name: reading.start() if past == 0 else slot.state,
            "position_ids": torch.arange(past, total, device=ids.device)[None],
        }
        if reading.masked:
            given["attention_mask"] = torch.ones(1, total, dtype=torch.long, device=ids.device)
        out = self._call(ids, given)
        slot.state = out[reading.name]
        return _logits_of(out)

    # --- what is not taken on trust ---

    @torch.no_grad()
    def _causal(self) -> bool:
        """Whether earlier logits stay as they are when the last token of the probe changes."""
        ids = self._probe.to(self.device)
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        logits = self._logits(ids)
        if logits.isnan().any():
            raise ConfigError(
                f"{type(self.foreign).__name__} gives NaN in {self.compute}; load it with "
                "dtype='float32', or look for NaN in its weights"
            )
        return _close(self._logits(other)[:, :-1], logits[:, :-1])

    @torch.no_grad()
    def _choose_reading(self) -> "_Reading | None":
        """A way to go on from what was read that gives the logits of reading all of it again.

        None, with a note on stderr, if no way does: then every token reads the whole text.
        """
        whole = self._logits(self._probe.to(self.device))
        for reading in _readings(self._takes):
            if self._agrees(reading, whole):
                return reading
        print(
            f"{type(self.foreign).__name__}: its cache gives other logits here than reading the "
            "whole text, or fails; so the whole text is read for every token, which is slow",
            file=sys.stderr,
        )
        return None

    def _agrees(self, reading: "_Reading", whole: Float[Tensor, "1 T V"]) -> bool:
        slot, found, past = _Slot(), [], 0
        try:
            for ids in self._probe.to(self.device).split([PROBE - 2, 1, 1], 1):
                found.append(self._continued(ids, past, slot, reading))
                past += ids.shape[1]
        except Exception:  # noqa: BLE001 (not our code: it may fail in any way, and another is left)
            return False
        return _close(torch.cat(found, 1), whole)

    def _versions(self) -> list[int]:
        """How often each parameter was written to."""
        return [parameter._version for parameter in self.parameters()]

    def _tied(self) -> bool:
        head = self.get_submodule(self._head) if self._head else None
        embedding = _part(self.foreign, "get_input_embeddings")
        weights = [getattr(module, "weight", None) for module in (head, embedding)]
        return weights[0] is not None and weights[0] is weights[1]


@dataclass(frozen=True)
class _Reading:
    """A way to go on: the parameter that takes what was read, and what it begins with."""

    name: str
    start: Callable[[], Any]
    masked: bool = True  # whether the mask of all that was read is given, as `generate` does


def _readings(takes: set[str]) -> Iterator[_Reading]:
    from transformers import DynamicCache

    for masked in (True, False):
        for name in STATES:
            if name in takes:
                yield _Reading(name, lambda: None, masked)
        for name in _KEYS_AND_VALUES:
            if name in takes:
                yield _Reading(name, DynamicCache, masked)


def _parameters(forward: Callable[..., Any]) -> set[str]:
    found = inspect.signature(forward).parameters
    rest = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in found.values())
    return {*found, *(("use_cache",) if rest else ())}


def _logits_of(out: Any) -> Float[Tensor, "B T V"]:
    return out.logits if hasattr(out, "logits") else out[0]


def _close(found: Tensor, wanted: Tensor) -> bool:
    finite, share = wanted.isfinite(), TOLERANCE.get(wanted.dtype, COARSE)
    if not torch.equal(found[~finite], wanted[~finite]):  # -inf is for ids that are never meant
        return False
    found, wanted = found[finite], wanted[finite]
    return bool((found - wanted).abs().max() <= share * wanted.abs().max())


def _vocab(foreign: nn.Module, config: Any) -> int:
    stated = getattr(config, "vocab_size", None)
    weight = getattr(_part(foreign, "get_input_embeddings"), "weight", None)
    if stated:
        return stated
    if weight is None:
        raise ConfigError(
            f"the config of {type(foreign).__name__} has no vocab_size, and its code names no "
            "embedding; set vocab_size in config.json"
        )
    return len(weight)


def _limit(config: Any) -> int:
    """Positions that the config allows."""
    stated = [getattr(config, name, None) for name in _LIMITS]
    return next((n for n in stated if isinstance(n, int) and n > 0), UNLIMITED)


def _part(foreign: nn.Module, getter: str) -> nn.Module | None:
    """The embedding or head, if the code can say which module that is."""
    try:
        return getattr(foreign, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _head_name(foreign: nn.Module) -> str | None:
    head = _part(foreign, "get_output_embeddings")
    names = (name for name, module in foreign.named_modules() if module is head)
    found = next(names, None)
    return None if head is None or found is None else f"{FOREIGN}.{found}"


def _mark_linears(foreign: nn.Module) -> None:
    """Give linears the two names by which adapters know one; see `ardor.adapters.lora`."""
    for module in foreign.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            _mark(module, module.in_features, module.out_features)
        elif _is_conv1d(module) and weight is not None:
            _mark(module, *weight.shape)


def _mark(linear: Any, inputs: int, outputs: int) -> None:
    linear.inputs, linear.outputs = inputs, outputs


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)

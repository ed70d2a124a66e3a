"""What a model takes while it is held, run and trained: bytes by purpose, moment by moment.

Every figure follows from what the implementation keeps: who changes what is saved for the backward
pass changes `saved` too, and tests/memory measures both. Bytes are those a process has resident.

Axes: D model width, V vocabulary, N tokens of a micro-batch, R adapter rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

from ardor.arch import spec as specs
from ardor.memory.beginnings import factored
from ardor.memory.formats import WIDTHS, weight_bytes
from ardor.memory.optimizers import STATES
from ardor.memory.products import KEPT
from ardor.memory.saved import How, ffn_per_token, per_token, working_per_token
from ardor.memory.shapes import Shape, count, is_linear, is_quantized, parameters

MIB = 1 << 20

# Measured, with torch 2.13 for CPUs on Linux: the interpreter, torch and what the verb imports.
PROCESS = {"generate": 262 * MIB, "train": 360 * MIB}
# Of an accelerator: CUDA's context and the libraries that it loads. Not measured here.
CONTEXT = 500 * MIB
# glibc gives blocks back to the system at once from 32 MiB on, and keeps smaller ones for later;
# where those that come later do not fit into the gaps, both are resident. Measured: so much of
# what comes and goes in such blocks is.
LARGE_BLOCK = 32 * MIB
KEPT_FREE = 0.3
# oneDNN compiles a bfloat16 product for each new number of rows; see products for how many it
# keeps. Measured with AVX-512: 0.57 MiB each, whatever the sizes; for float32 it keeps nothing.
KERNEL = int(0.57 * MIB)
# What differs from one ragged batch to the next splits the heap; most of it in the first dozens.
# Measured in three runs of 60 to 300 steps that take 0.6 to 1.0 GiB: so much more than after two.
RAGGED_HEAP, RAGGED_BATCHES = 100 * MIB, 40
# Of logits and slopes at a time (loss.CHUNK_BYTES, and its ACCELERATOR_CHUNK_BYTES).
LOSS_CHUNK, ACCELERATOR_LOSS_CHUNK = 32 * MIB, 512 * MIB
FAULT = 64 << 10  # bytes that the kernel maps around the row of a table that is read
Named = TypeVar("Named")


@dataclass(frozen=True, kw_only=True)
class Use:
    """What is to be done with a model, and how it is to be held meanwhile."""

    task: Literal["generate", "train"]
    method: Literal["full", "lora", "qlora"] = "full"  # of training
    weights: str  # dtype that they are held in where they are not quantized
    compute: str  # dtype of activations
    quantization: str | None = None  # nf4, nf4-dq: of the linears in the layers
    rows: int = 1  # sequences side by side: prompts, or the examples of a micro-batch
    length: int  # tokens of each: the prompt's, or the longest example's
    ragged: bool = False  # the examples of a micro-batch differ in length
    batch_sizes: int = 1  # how many different numbers of tokens micro-batches have
    batches: int = 1  # micro-batches of the whole run whose documents have other lengths
    new_tokens: int = 0  # of generation, beyond the prompt
    accumulation: int = 1  # micro-batches of an optimizer step
    rank: int = 16  # of adapters
    optim: str = "adamw"  # of memory.optimizers.STATES
    momentum: bool = False  # of sgd
    recompute: Literal["none", "selective", "layers"] = "none"  # activations that are not kept
    in_backward: bool = False  # a gradient is forgotten once its weight is updated
    offloaded: bool = False  # the optimizer's state waits in the CPU's memory
    scratch: bool = False  # trained from random weights: there is nothing that could be adapted
    ranks: Mapping[str, int] | None = None  # of the adapted linears; None: all of the layers
    upcast: Literal["norms", "peft", "none"] = "none"  # of qlora's 16-bit weights, to float32
    begun: str = "default"  # init_lora_weights: what adapters begin with
    originals: int = 0  # bytes of full weights that LoftQ holds all at once
    offset: bool = False  # A and B as they began are kept beside them: PiSSA, OLoRA
    dora: bool = False
    trained: Mapping[str, Shape] | None = None  # parameters that train; None: all, or adapters
    evaluated: int = 0  # tokens of the largest batch of held-out data
    reference: int = 0  # of the largest pass of the model that preferences are measured against
    surveyed: int = 0  # of the largest batch whose inputs EVA looks at; 0: as large as the others
    accelerator: bool = False
    mapped: bool = True  # weights are pages of their file
    beside: int = 0  # bytes of the file's pages that stay in memory beside copies of them
    compiled: bool = True  # kernels/*.c are there, with those that multiply bfloat16
    threads: int = 2

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Term(NamedTuple):
    name: str
    bytes: int
    why: str  # for people


class Moment(NamedTuple):
    """What is held at once."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Estimate:
    """The moments that could be the largest; `peak` is."""

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def bytes(self) -> int:
        return self.peak.bytes


def estimate(spec: specs.Decoder, use: Use) -> Estimate:
    """What `use` of a decoder of `spec` takes of the device it runs on, moment by moment."""
    held = Held(spec, use)
    moments = _generating(held) if use.task == "generate" else _training(held)
    return Estimate(tuple(Moment(name, _shown(terms)) for name, *terms in moments))


def cache_bytes(spec: specs.Decoder, rows: int, capacity: int, dtype: str) -> int:
    """Keys and values of `capacity` positions, or the latents that both are made from.

    A window bounds what is read and not what is kept, so it saves nothing here. A layer that reads
    the keys of another keeps none.
    """
    return rows * capacity * WIDTHS[dtype] * sum(_kept(layer.mixer) for layer in spec.layers)


def _kept(mixer: specs.Attention | specs.LatentAttention) -> int:
    """Numbers that a layer keeps of each position."""
    if isinstance(mixer, specs.LatentAttention):
        return mixer.kv_rank + mixer.rope.rotated
    return 0 if mixer.kv_layer is not None else 2 * mixer.kv_heads * mixer.head_width


class Held:
    """The parts of a model under one use, in bytes."""

    def __init__(self, spec: specs.Decoder, use: Use):
        self.spec, self.use = spec, use
        self.shapes = parameters(spec)
        self.width = WIDTHS[use.compute]

    @cached_property
    def weights(self) -> int:
        """All weights; what is quantized, in that format."""
        return self._bytes(self.shapes)

    @cached_property
    def untouched(self) -> int:
        """Bytes of a mapped embedding that no token reads: they never come into memory.

        A tied one is read whole by the head.
        """
        use = self.use
        if not use.mapped or self.spec.tied or use.accelerator:
            return 0
        table = weight_bytes(self.shapes["embed_tokens.weight"], use.weights)
        read = use.rows * (use.length + use.new_tokens) * FAULT
        return max(0, table - read)

    @cached_property
    def adapters(self) -> dict[str, int]:
        """Numbers of A and B beside each adapted linear."""
        use, found = self.use, {}
        if use.method == "full" or use.task != "train":
            return found
        for linear, r in self.ranks.items():
            shape = self.shapes[f"{linear}.weight"]
            found[linear] = math.prod(shape[:-2]) * r * sum(shape[-2:])
        return found

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Of the adapters."""
        use = self.use
        if use.method == "full" or use.task != "train":
            return {}
        if use.ranks is not None:
            return use.ranks
        linears = (n for n, s in self.shapes.items() if is_linear(n, s))
        return dict.fromkeys((n.removesuffix(".weight") for n in linears), use.rank)

    @property
    def constants(self) -> int:
        """Bytes that adapters hold and do not train: what they began with; norms of rows, twice."""
        begun = sum(self.adapters.values()) if self.use.offset else 0
        return 4 * (begun + (2 * self._outputs(self.ranks) if self.use.dora else 0))

    @property
    def widened(self) -> int:
        """Bytes of the largest adapted weight in float32, which DoRA's norms are taken of."""
        if not self.use.dora:
            return 0
        return 4 * max((math.prod(self.shapes[f"{name}.weight"]) for name in self.ranks), default=0)

    def _outputs(self, linears: Iterable[str]) -> int:
        return sum(self.shapes[f"{name}.weight"][-2] for name in linears)

    @property
    def trained(self) -> int:
        """Numbers that the optimizer changes."""
        return count(self.changed)

    @cached_property
    def changed(self) -> Mapping[str, Shape]:
        """What the optimizer changes."""
        if self.use.trained is not None:
            return self.use.trained
        if self.use.method == "full":
            return self.shapes
        found: dict[str, Shape] = {}
        for linear, r in self.ranks.items():
            *experts, outputs, inputs = self.shapes[f"{linear}.weight"]
            found[f"{linear}.lora_A"] = (*experts, r, inputs)
            found[f"{linear}.lora_B"] = (*experts, outputs, r)
            if self.use.dora:
                found[f"{linear}.lora_magnitude_vector"] = (outputs,)
        return found

    @cached_property
    def first(self) -> int:
        """The lowest layer that a gradient reaches; below it nothing waits for one."""
        above = ("layers.", "norm.", "lm_head.", "embed_out_proj.")
        if any(not name.startswith(above) for name in self.changed):
            return 0
        layers = (int(n.split(".")[1]) for n in self.changed if n.startswith("layers."))
        return min(layers, default=len(self.spec.layers))

    @cached_property
    def trains_head(self) -> bool:
        """Whether the whole weight that makes logits is trained."""
        name = "embed_tokens" if self.spec.tied else "lm_head"
        return any(n in self.changed for n in (f"{name}.weight", f"{name}.copy.weight"))

    @property
    def master(self) -> int:
        """Bytes of a trained number, its gradient and its moments. Adapters are float32."""
        return WIDTHS[self.use.weights] if self.use.method == "full" else 4

    @cached_property
    def states(self) -> int:
        """Bytes that the optimizer keeps."""
        state, width = STATES[self.use.optim], self.master
        held = sum(state(name, shape, width) for name, shape in self.changed.items())
        return held + self.use.momentum * width * self.trained

    @property
    def largest(self) -> int:
        """Numbers of the largest weight that is trained."""
        return max(math.prod(shape) for shape in self.changed.values())

    def of_layer(self, index: int) -> dict[str, Shape]:
        return _within(index, self.shapes)

    def part_bytes(self, part: str) -> int:
        """Of the weights of a module: "layers.3", "embed_tokens"."""
        return self._bytes({n: s for n, s in self.shapes.items() if n.startswith(f"{part}.")})

    def _bytes(self, shapes: dict[str, Shape]) -> int:
        return sum(
            weight_bytes(s, self._dtype(n), self.use.quantization if is_quantized(n, s) else None)
            for n, s in shapes.items()
        )

    def _dtype(self, name: str) -> str:
        """That a weight is held in where it is not packed."""
        use = self.use
        norm = "norm" in name.split(".")[-2]
        wide = use.upcast == "peft" or (use.upcast == "norms" and norm)
        return "float32" if wide and use.method == "qlora" else use.weights

    def gradients(self, index: int) -> int:
        """Of one layer's trained numbers."""
        return self.master * count(_within(index, self.changed))

    def casts(self, index: int) -> int:
        """Copies of one layer's float32 masters in the compute dtype: autograd keeps them.

        Frozen weights are held in the compute dtype already.
        """
        if self.width >= self.master or index < self.first:
            return 0
        if self.use.method == "full":  # those that are frozen too: the input's gradient needs them
            return self.width * count(self.of_layer(index))
        begun = sum(_within(index, self.adapters).values()) if self.use.offset else 0
        return self.width * (count(_within(index, self.changed)) + begun)

    def saved(self, index: int) -> int:
        """Activations of one layer that wait for the backward pass."""
        if index < self.first:
            return 0
        if self.use.recompute == "layers":
            return self.use.tokens * self.spec.width * self.width
        layer = self.spec.layers[index]
        return self.use.tokens * per_token(self.spec.width, layer, self._how(index)) - (
            self.again(index) if self.use.recompute == "selective" else 0
        )

    def again(self, index: int) -> int:
        """Activations of one layer that come to be only when its backward pass begins."""
        layer, how = self.spec.layers[index], self._how(index)
        if self.use.recompute == "none" or index < self.first:
            return 0
        of = per_token if self.use.recompute == "layers" else ffn_per_token
        return self.use.tokens * of(self.spec.width, layer, how)

    def kernels(self) -> int:
        """Compiled products beyond those of the one batch size that are part of the process.

        Each batch size needs its own, forwards and backwards. So does each number of rows that an
        expert can get: they spread to about 1.2 times their mean over a few steps. And a ragged
        batch brings about one more: a length of the short documents, whose attention is torch's.
        """
        use = self.use
        if use.accelerator or use.compute != "bfloat16":
            return 0
        ways = 3 if use.method == "full" else 2
        shapes = {s for n, s in self.shapes.items() if is_linear(n, s) and len(s) == 2}
        adapters = {side for shape in shapes for side in shape} if self.adapters else set()
        found = ways * (use.batch_sizes - 1) * (len(shapes) + 2 * len(adapters))
        found += use.batches - 1
        of_experts = 6 if any(".experts." in name for name in self.adapters) else 2
        for ffn in {layer.ffn for layer in self.spec.layers}:
            if isinstance(ffn, specs.Experts):
                mean = use.tokens * ffn.router.per_token / ffn.count
                found += ways * of_experts * math.ceil(1.2 * mean)
        return KERNEL * min(found, KEPT)

    def kept_free(self, index: int) -> int:
        """What the allocator keeps of one layer's activations, copies and gradients; see above."""
        use, small = self.use, 0
        if use.accelerator:
            return 0
        if use.tokens * self.spec.width * self.width < LARGE_BLOCK:
            small += self.saved(index)
        if 4 * max(math.prod(s) for s in self.of_layer(index).values()) < LARGE_BLOCK:
            small += self.casts(index) + self.gradients(index)
        return int(KEPT_FREE * small)

    def working(self, index: int, *, training: bool, tokens: int) -> int:
        """What comes and goes while one layer is computed, forwards or backwards.

        With it one expanded weight where weights are quantized, and the gradient of the largest
        matrix in both dtypes where it is trained in a narrower one than it is held in.
        """
        layer, use = self.spec.layers[index], self.use
        numbers = working_per_token(self.spec.width, layer, self._how(index), training=training)
        largest = max(math.prod(s) for s in self.of_layer(index).values())
        expanded = self.width * largest if use.quantization is not None else 0
        if training and use.method == "full":
            expanded = self.width * largest
        return tokens * numbers + expanded + self._scratch(layer.mixer, tokens)

    def _scratch(self, mixer: specs.Attention | specs.LatentAttention, tokens: int) -> int:
        """Of the compiled attention: packed keys, values and sums of one head for each thread."""
        if isinstance(mixer, specs.LatentAttention) or not self._how(0).flash:
            return 0
        padded = -(-self.use.length // 64) * 64
        wide = -(-mixer.head_width // 64) * 64
        floats = padded * (11 * wide // 2 + 2) + 4 * 64 * 64 + 2 * 64 * wide
        return 4 * self.use.threads * floats

    def _how(self, index: int) -> How:
        use = self.use
        start, changed = f"layers.{index}.", _within(index, self.changed)
        adapted = _within(index, self.ranks)
        whole = {n.removesuffix(".weight").removesuffix(".copy") for n in changed}
        flash = use.compute == "bfloat16" and use.compiled and not use.accelerator
        return How(
            width=self.width,
            trained=frozenset(n.removeprefix(start) for n in whole if use.task == "train"),
            adapted={n.removeprefix(start): r * (1 + use.offset) for n, r in adapted.items()},
            scaled=self._outputs(adapted) if use.dora else 0,
            flash=flash and use.length >= 32,
            compiled=use.compiled,
            ragged=use.ragged,
        )

    @property
    def apart(self) -> int:
        """Bytes of a head's gradient beside that of earlier micro-batches: in 16 bits alone."""
        apart = self.trains_head and self.use.accumulation > 1 and self.master < 4
        return self.master * self.head if apart else 0

    @property
    def table(self) -> int:
        """Bytes of an embedding's gradient beside an earlier one: a tied head's, or a batch's."""
        trained = any(f"embed_tokens.{n}" in self.changed for n in ("weight", "copy.weight"))
        beside = self.spec.tied or self.use.accumulation > 1
        return self.master * self.head if trained and beside else 0

    @property
    def head(self) -> int:
        """Numbers of the weight that makes logits."""
        return math.prod(self.shapes["embed_tokens.weight" if self.spec.tied else "lm_head.weight"])

    def loss(self) -> int:
        """The chunked loss: logits of one chunk, and what a trained head takes beside.

        Slopes are written over the logits of a plain product, and beside those of a finished one.

        A weight that is wider is cast to the compute dtype; its gradient is summed in its own.
        """
        use = self.use
        states = 2 * use.tokens * self.spec.width * self.width  # and their gradient
        compiled = use.compiled and not use.accelerator
        finished = self.spec.logit_softcap is not None or self.spec.logit_scale != 1.0
        number = (5 if finished else 1) * self.width + (0 if compiled else 8)  # else float32 too
        each = self.spec.vocab * number
        chunk = ACCELERATOR_LOSS_CHUNK if use.accelerator else LOSS_CHUNK
        logits = each * min(use.tokens, max(1, chunk // each))
        name = "embed_tokens.weight" if self.spec.tied else "lm_head.weight"
        held = self.master if self.trains_head else WIDTHS[self._dtype(name)]
        cast = self.width * self.head if self.width < held else 0
        return states + logits + cast + self.apart


def _process(use: Use) -> Term:
    if use.accelerator:
        return Term("device context", CONTEXT, "CUDA and its libraries")
    return Term("process", PROCESS[use.task], "Python, torch and what else is imported; measured")


def _weights(held: Held) -> Iterator[Term]:
    use = held.use
    form = use.weights if use.quantization is None else f"{use.quantization}, rest {use.weights}"
    number = count(held.shapes)
    about = f"{number / 1e6:,.1f} M parameters, {form}"
    yield Term("weights", held.weights - (held.untouched if use.task == "generate" else 0), about)
    yield Term("file", use.beside, "mapped beside copies, until the system takes it back")


def _generating(held: Held) -> Iterator[tuple[Any, ...]]:
    """Loading is never the peak: weights are mapped, or come one at a time."""
    use, spec = held.use, held.spec
    positions = min(use.length + use.new_tokens, spec.max_positions)
    cache = cache_bytes(spec, use.rows, positions, use.compute)
    layers = range(len(spec.layers))
    stream = 2 * use.length * spec.width * held.width  # before and after a layer
    working = stream + max(held.working(i, training=False, tokens=use.length) for i in layers)
    logits = use.rows * spec.vocab * (4 + held.width)
    yield (
        "reading the prompt",
        _process(use),
        *_weights(held),
        Term("KV cache", cache, f"{use.rows} x {positions:,} positions, {use.compute}"),
        Term("activations", max(working, logits), "of one layer of one prompt; the last logits"),
    )


def _training(held: Held) -> Iterator[tuple[Any, ...]]:
    """An optimizer step after the first: before it there are no moments."""
    use, layers = held.use, range(len(held.spec.layers))
    own = 0 if use.method == "full" else 4 * held.trained + held.constants
    fixed = [
        _process(use),
        *_weights(held),
        Term("adapters", own, f"rank {use.rank}, float32"),
        Term("optimizer", _states(held), f"{use.optim}'s state"),
        Term("kernels", held.kernels(), "products compiled for each number of rows"),
    ]
    # With "layers", copies of the masters are made anew with the rest of a layer.
    copies = [held.casts(i) for i in layers]
    kept = [0] * len(copies) if use.recompute == "layers" else copies
    saved = [held.saved(i) + kept[i] for i in layers]
    gradients = [held.gradients(i) for i in layers]
    wide = held.master
    head = wide * held.head if held.trains_head else 0
    rest = wide * held.trained - sum(gradients) - head  # of tables and the last norm
    waiting = wide * held.trained if use.accumulation > 1 else 0
    most = wide * held.largest if use.in_backward else wide * held.trained
    pending = held.apart if held.spec.tied else 0  # until the embedding's is added to it

    kept_free = sum(map(held.kept_free, layers))
    if not use.accelerator:
        kept_free += int(RAGGED_HEAP * min(1, (use.batches - 1) / RAGGED_BATCHES))
    slack = Term("allocator", kept_free, "freed memory that it keeps")

    def moment(name: str, done: int, kept: int, working: int) -> tuple[Any, ...]:
        return (
            name,
            *fixed,
            Term("gradients", min(most, max(done, waiting)), "of what is trained"),
            Term("activations", kept, f"saved for the backward pass, {use.tokens:,} tokens"),
            Term("working set", working, "of the layer, or the loss, that is computed"),
            slack,
        )

    yield moment("the loss", head, sum(saved), held.loss())
    yield from _before(held)
    if held.widened:
        yield moment("the last layer's norms", 0, sum(saved[:-1]), held.widened)
    for index in layers:
        done = head + sum(gradients[index + 1 :])
        working = held.working(index, training=True, tokens=use.tokens) + held.again(index)
        working += copies[index] - kept[index] + pending
        working += held.widened if use.recompute == "layers" else 0
        yield moment(f"backward, layer {index}", done, sum(saved[: index + 1]), working)
    done = head + sum(gradients) + rest
    yield moment("the embedding's gradient", done, 0, held.table + pending)
    if wide < 4:
        # One weight, its gradient and its state, in float32 and rounded.
        there = 4 * held.largest * 4
        yield moment("the update", wide * held.trained, 0, there)
    if use.evaluated:
        yield moment("evaluation", 0, 0, _forward(held, use.evaluated))
    if use.reference:
        done = waiting if use.accumulation > 1 else 0
        yield moment("the reference", done, 0, _forward(held, use.reference))


def _forward(held: Held, tokens: int) -> int:
    """What comes and goes in a pass that nothing is learnt from."""
    layers = range(len(held.spec.layers))
    working = max(held.working(i, training=False, tokens=tokens) for i in layers)
    return 3 * tokens * held.spec.width * held.width + max(working, held.widened)


def _before(held: Held) -> Iterator[tuple[Any, ...]]:
    """What it takes to begin adapters with more than chance, before any is there."""
    use = held.use
    if use.begun == "eva":
        found, kept = _surveying(held)
        working = Term("working set", found, "of one linear's singular vectors")
        directions = Term("activations", kept, "directions of the inputs")
        yield ("EVA's directions", _process(use), *_weights(held), directions, working)
        return
    shapes = (held.shapes[f"{name}.weight"] for name in held.ranks)
    if found := 4 * max((factored(use.begun, shape) for shape in shapes), default=0):
        beginnings = Term("adapters", 4 * held.trained + held.constants, f"rank {use.rank}")
        working = Term("working set", found, "of the largest weight's factors, float32")
        originals = Term("originals", use.originals, "full weights that lie otherwise in the file")
        moment = "the adapters' beginning"
        yield (moment, _process(use), *_weights(held), beginnings, originals, working)


def _surveying(held: Held) -> tuple[int, int]:
    """Bytes that come and go, and that stay, while EVA finds the principal inputs.

    The inputs of one linear in float32, these with the directions so far, the copy that LAPACK
    destroys, both factors and its workspace (gesdd: 4 m^2 where m is the smaller side); and the
    directions of all linears.
    """
    most, kept, rows = 0, 0, held.use.surveyed or held.use.tokens
    for name, r in held.ranks.items():
        if ".experts." in name:  # EVA leaves them out
            continue
        inputs = held.shapes[f"{name}.weight"][-1]
        directions = max(2 * r, 64)
        both, kept = rows + directions, kept + directions * inputs
        least = min(both, inputs)
        factors = least * (both + inputs + 4 * least)
        most = max(most, rows * inputs + 2 * both * inputs + factors)
    return 4 * most + _forward(held, rows), 4 * kept


def _states(held: Held) -> int:
    """Of the optimizer, on the device: where states wait elsewhere, those of one weight."""
    use = held.use
    if not (use.offloaded and use.accelerator):
        return held.states
    state = STATES[use.optim]
    return max(state(name, shape, held.master) for name, shape in held.changed.items())


def _within(index: int, named: Mapping[str, Named]) -> dict[str, Named]:
    """Of what is named, what belongs to one layer."""
    start = f"layers.{index}."
    return {name: held for name, held in named.items() if name.startswith(start)}


def _shown(terms: list[Term]) -> tuple[Term, ...]:
    return tuple(term for term in terms if term.bytes)

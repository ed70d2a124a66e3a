"""`ardor merge`: an adapter folded into its base, written as a checkpoint, and what that cost."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ardor.adapters.config import LoraConfig
from ardor.adapters.initial import dense_weight, is_packed
from ardor.adapters.lora import linear_names
from ardor.adapters.merge import Residual, plain
from ardor.adapters.merge import merge as merge_adapter
from ardor.adapters.peft_layout import base_of
from ardor.arch.linear import place_of
from ardor.errors import ConfigError
from ardor.files.atomic import explained
from ardor.load import CONFIG, Model, load_model
from ardor.quant.bnb8 import THRESHOLD
from ardor.quant.config import Quantization, published
from ardor.quant.experts import QuantizedExperts
from ardor.quant.formats import FORMATS
from ardor.quant.linear import QuantizedLinear
from ardor.quantize import quantize
from ardor.save import save_model

Onto = Literal["16bit", "dequantized", "requantized"]
PROBE = 64  # tokens on which the logits are compared


class LogitCheck(NamedTuple):
    """How far the written checkpoint is from the base with its adapter, on the same tokens."""

    largest: float  # difference of two logits
    nats: float  # mean Kullback-Leibler divergence of a position's next token
    same_choice: float  # share of positions with the same most probable token


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote, and what is lost of the adapter on the way."""

    onto: Onto
    why: str
    base: str
    trained_on: str | None  # the format of the base in training
    residuals: tuple[Residual, ...]
    logits: LogitCheck

    def mean(self, kind: str) -> float | None:
        """Of a residual over all maps; None where it does not arise."""
        found = [value for one in self.residuals if (value := getattr(one, kind)) is not None]
        return sum(found) / len(found) if found else None


def merge(
    model: str | Path,
    output: str | Path,
    *,
    onto: Onto | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str = "cpu",
) -> MergeReport:
    """Write the base of a run or adapter with the adapter folded in, as transformers reads it.

    `onto` "16bit" adds to the full weights, in float32 with one rounding; "dequantized" to what
    the quantized base of the training stands for, in 16 bits; "requantized" packs that sum again,
    which erases most of a small adapter. None: 16bit, or dequantized where the adapter makes up
    for the quantization (LoftQ) or the checkpoint holds no full weights. The logits of what was
    written are compared with those of the base and adapter that were trained.

    Raises: ConfigError for a model without adapter, and an `onto` that cannot be had.
    """
    trained = load_model(model, adapter=adapter, revision=revision, device=device)
    if trained.adapter is None:
        raise ConfigError(
            f"{model} has no adapter to merge; give the folder of a LoRA or QLoRA run, an adapter, "
            "or a model with --adapter"
        )
    probe = _probe(trained)
    expected = _logits(trained, probe)
    chosen, why = _onto(onto, trained, trained.adapter)
    format = trained.quantization
    again = _as_trained(trained) if chosen == "requantized" else None
    if chosen == "16bit" and format is not None:
        target = load_model(
            model, adapter=adapter, revision=revision, device=device, quantization="none"
        )
        before = _bases(trained)
        merged = merge_adapter(target.decoder, trained=before, packed=_packing(format))
    else:
        target = trained
        # Packed again, codes must come out as they were: float32 on the way.
        dtype = torch.float32 if again else _sixteen(trained)
        packed = None if format is None else _packing(format)
        merged = merge_adapter(target.decoder, None if format is None else dtype, packed=packed)
        if format is not None:
            _expand(target.decoder, dtype)
            target.quantization = target.quantizing = None
    target.adapter = None
    if again:
        _save_packed(target, again, Path(output))
    else:
        save_model(target, output)
    written = load_model(output, device=device)
    check = _compare(expected, _logits(written, probe))
    return MergeReport(chosen, why, trained.source, format, merged.residuals, check)


def _onto(onto: Onto | None, trained: Model, adapter: LoraConfig) -> tuple[Onto, str]:
    """What is merged into, and why."""
    packed = trained.quantization is not None
    stored = packed and trained.quantizing is None
    loftq = adapter.init_lora_weights == "loftq"
    if onto is None and stored:
        return "dequantized", "the checkpoint holds its weights packed, and no full ones"
    if onto is None and loftq:
        return "dequantized", "a LoftQ adapter makes up for the quantization it was trained on"
    if onto is None or onto == "16bit":
        if stored:
            raise ConfigError(
                f"onto=16bit: {trained.source} holds its weights as {trained.quantization}, and no "
                "full ones; use --onto dequantized"
            )
        if loftq:
            raise ConfigError(
                "onto=16bit: this adapter began with LoftQ, and would make up for a quantization "
                "that the full weights do not have; use --onto dequantized"
            )
        return "16bit", "one rounding of the float32 sum"
    if onto not in ("dequantized", "requantized"):
        raise ConfigError(f"onto={onto!r} is not known; choose 16bit, dequantized or requantized")
    if not packed:
        raise ConfigError(
            f"onto={onto}: {trained.source} was trained on full weights; leave onto out"
        )
    if onto == "requantized" and trained.quantization not in FORMATS:
        raise ConfigError(
            f"onto=requantized: nothing here writes {trained.quantization}; use --onto dequantized"
        )
    return onto, "as asked"


def _bases(trained: Model) -> Callable[[str], Tensor]:
    def weight(name: str) -> Tensor:
        return dense_weight(base_of(trained.decoder.get_submodule(name)))

    return weight


def _packing(format: str) -> Callable[[Tensor], Tensor] | None:
    """What packing a weight in the base's format makes of it."""
    made = FORMATS.get(format)
    return None if made is None else lambda weight: made(weight).dequantize(torch.float32)


def _sixteen(model: Model) -> torch.dtype:
    found = model.precision.compute
    return found if found.itemsize == 2 else torch.bfloat16


def _expand(decoder: nn.Module, dtype: torch.dtype) -> None:
    """Every linear that is still packed, experts' too, as a plain one."""
    for name, module in [*decoder.named_modules()]:
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            decoder.set_submodule(name, plain(module, module.dequantized(dtype)))


def _as_trained(trained: Model) -> Quantization:
    """How its base is packed: what was asked for, or what its files say and hold."""
    for name, module in trained.decoder.named_modules():
        if isinstance(module, QuantizedExperts) and module.joined:
            raise ConfigError(
                f"onto=requantized: files of this model hold all experts of "
                f"{name.removesuffix('.base')} in one tensor, which no format packs; use --onto "
                "dequantized"
            )
    if trained.quantizing is not None:
        return trained.quantizing
    assert trained.quantization is not None
    how, decoder = published(trained.config, CONFIG), trained.decoder
    dense = (
        name
        for name in linear_names(decoder)
        if place_of(decoder, name) == "layers"
        and not is_packed(base_of(decoder.get_submodule(name)))
    )
    threshold = THRESHOLD if how is None else how.threshold
    return Quantization(trained.quantization, (*dense,), threshold)


def _save_packed(target: Model, quantization: Quantization, output: Path) -> None:
    beside = output.resolve().parent
    with explained(output):
        beside.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=beside, prefix=".whole-")
    with folder as whole:
        save_model(target, whole)
        quantize(whole, output, quantization)


def _probe(model: Model) -> Int[Tensor, "1 T"]:
    facts = model.decoder.facts
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE, facts.max_positions)
    return torch.randint(0, facts.vocab, (1, length), generator=generator)


@torch.inference_mode()
def _logits(model: Model, ids: Int[Tensor, "1 T"]) -> Float[Tensor, "1 T V"]:
    decoder = model.decoder.eval()
    return decoder.logits(decoder.hidden(ids.to(decoder.device))).cpu()


def _compare(expected: Float[Tensor, "1 T V"], found: Float[Tensor, "1 T V"]) -> LogitCheck:
    one, two = expected.log_softmax(-1), found.log_softmax(-1)
    nats = (one.exp() * (one - two)).sum(-1).mean()
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return LogitCheck(float((expected - found).abs().max()), float(nats), float(same))

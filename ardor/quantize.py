"""`ardor quantize`: a checkpoint in fewer bits, one tensor at a time, and what that costs."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardor.errors import CheckpointError, ConfigError, DataError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Rules
from ardor.files.atomic import atomic_directory
from ardor.files.hub import PATTERNS, resolve
from ardor.files.json import read_object, write_json
from ardor.files.runs import chosen_checkpoint
from ardor.files.weights import WeightFiles, open_weights, write_weights
from ardor.load import CONFIG, Model, load_model, on_meta, tensor_problems, tokenizer_of
from ardor.packing import Arrival, dense_modules
from ardor.quant.config import SECTION, Quantization, published
from ardor.quant.packed import PackedWeight
from ardor.score import token_logprobs

SHARD = 1 << 30  # bytes that are held while a file is written
WINDOW = 1024  # tokens that are scored together
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", CONFIG)  # written anew, or not copied


@dataclass(frozen=True)
class MapError:
    """Of one weight: the Frobenius norm of what changed, over that of the weight."""

    name: str
    relative: float
    bits_per_weight: float


@dataclass
class Report:
    """Maps in the order of the model. Perplexities are None without a text."""

    format: str
    source: str
    output: str
    maps: list[MapError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # linear maps that stayed as they were
    bytes_before: int = 0  # of all weights
    bytes_after: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    @property
    def worst(self) -> list[MapError]:
        return sorted(self.maps, key=lambda one: -one.relative)

    @property
    def relative(self) -> float:
        """The mean over the maps."""
        return sum(one.relative for one in self.maps) / len(self.maps)


def quantize(
    name: str | Path,
    output: str | Path,
    quantization: Quantization,
    *,
    text: str | None = None,
    revision: str | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write `name` quantized to the directory `output`, which appears whole or not at all.

    Weights are read, quantized and written one at a time: memory holds a shard of a GiB and one
    weight. With a `text` both models score it. `tell` hears (done, total) tensors.

    Raises: ConfigError for a model that is quantized already or has nothing to quantize,
    CheckpointError for one that cannot be read or a directory with other things in it.
    """
    path = Path(name)
    if path.is_dir() and not (path / CONFIG).exists():
        path = chosen_checkpoint(path) or path
    source = resolve(str(path if path.is_dir() else name), revision, patterns=PATTERNS).path
    if not (source / CONFIG).exists():
        raise CheckpointError(f"{source} has no {CONFIG}; give a full model, not an adapter")
    config = read_object(source / CONFIG)
    if published(config, str(source / CONFIG)) is not None:
        raise ConfigError(f"{source} is quantized already; give the checkpoint it was made from")
    _refuse_to_remove(Path(output))
    report = Report(quantization.format, str(name), str(output))
    if text is not None:
        report.perplexity_before = perplexity(load_model(source), text)
    with atomic_directory(output) as partial:
        section = _write(source, config, partial, quantization, report, tell)
        write_json(partial / CONFIG, {**config, SECTION: section})
        for file in sorted(source.iterdir()):
            known = any(fnmatch(file.name, pattern) for pattern in PATTERNS)
            if known and not any(fnmatch(file.name, pattern) for pattern in WEIGHTS):
                shutil.copyfile(file, partial / file.name)
        if text is not None:
            report.perplexity_after = perplexity(load_model(partial), text)
    return report


def perplexity(model: Model, text: str, *, most: int = 8192) -> float:
    """exp of the mean nats of the first `most` tokens of a text, read in windows.

    Raises: DataError if the text is too short.
    """
    ids = tokenizer_of(model).encode(text)[:most]
    window = min(WINDOW, model.decoder.facts.max_positions)
    pieces = [ids[first : first + window] for first in range(0, len(ids), window)]
    found = [nats for piece in pieces if len(piece) > 1 for nats in _nats(model, piece)]
    if not found:
        raise DataError(f"a text of {len(ids)} tokens is too short to score; give at least 2")
    return float(torch.tensor(found, dtype=torch.float64).mean().exp())


def _nats(model: Model, ids: Sequence[int]) -> list[float]:
    return [-value for value in token_logprobs(model.decoder, ids)]


def _write(
    source: Path,
    config: dict[str, Any],
    directory: Path,
    quantization: Quantization,
    report: Report,
    tell: Callable[[int, int], None],
) -> dict[str, Any]:
    """The weights; what config.json is to say of them."""
    files = open_weights(source)
    family = family_of(config, path=str(source / CONFIG))
    spec = family.spec(HFConfig(config, path=str(source / CONFIG)))
    rules = family.rules(spec).bind(files.names())
    rules.check(files.names(), str(source))
    decoder = on_meta(spec, files, rules)
    for problem in tensor_problems(decoder, files, rules):
        raise CheckpointError(problem)
    arrival = Arrival(decoder, rules, files, quantization, torch.device("cpu"))
    write_weights(directory, _tensors(files, rules, arrival, report, tell), SHARD)
    if not report.maps:
        raise ConfigError(
            f"{quantization.format}: {source} has no linear maps that this format can hold; "
            "see which are skipped"
        )
    done = {one.name for one in report.maps}
    dense = [name for name in dense_modules(rules, decoder) if f"{name}.weight" not in done]
    report.kept = dense
    return quantization.section(dense, _compute(config))


def _tensors(
    files: WeightFiles,
    rules: Rules,
    arrival: Arrival,
    report: Report,
    tell: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    written: set[str] = set()
    total = len(files.names())
    for rule in rules.plain:
        values = arrival.values(rule, files.read) if arrival.chosen(rule) else ()
        for name, value, dense in values:
            report.maps.append(_error(name, value, dense))
            for end, tensor in value.tensors().items():
                report.bytes_after += tensor.nbytes
                yield f"{name.removesuffix('weight')}{end}", tensor
            written.add(name)
            tell(len(written), total)
    for name in files.names():
        report.bytes_before += files.size(name)
        if name not in written:
            report.bytes_after += files.size(name)
            yield name, files.read(name)
            written.add(name)
            tell(len(written), total)


def _error(name: str, value: PackedWeight, dense: Tensor) -> MapError:
    weight = dense.float()
    norm = weight.norm()
    change = (value.dequantize(torch.float32) - weight).norm()
    relative = float(change / norm) if norm else 0.0
    return MapError(name, relative, value.bytes * 8 / dense.numel())


def _compute(config: dict[str, Any]) -> torch.dtype:
    """What the weights that stay are stored in, as config.json says: bnb's compute dtype."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return getattr(torch, name.removeprefix("torch."), torch.float32)


def _refuse_to_remove(directory: Path) -> None:
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in PATTERNS)]
    if others:
        raise CheckpointError(
            f"{directory} also holds {', '.join(others[:5])}, which writing would remove; "
            "give a new or an empty directory"
        )

"""What is known of a model before any of its weights are: config.json, read as `load` reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ardor.arch import spec as specs
from ardor.errors import CheckpointError
from ardor.families import family_of
from ardor.families.hf_config import HFConfig
from ardor.families.rules import Rules
from ardor.files.hub import resolve
from ardor.files.json import read_object
from ardor.files.runs import ORIGIN, chosen_checkpoint
from ardor.memory.formats import WIDTHS
from ardor.memory.shapes import parameters

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Outline:
    source: str  # for people
    spec: specs.Decoder
    rules: Rules
    stored: str  # dtype of the weights in their files, as far as config.json says
    # Format of the weights in their files, or of the base while the named adapter was trained.
    quantization: str | None = None
    opaque: bool = False  # the files are packed in a format whose bytes are not known here


def outline(name: str | Path, revision: str | None = None) -> Outline:
    """Of a config.json, a directory, an adapter's base, a run, or a hub id.

    Of a hub id only config.json is fetched.

    Raises: CheckpointError if it is none of them, ConfigError if its family is unknown.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return outline_of(read_object(path), path)
    base: str | Path = _base(path) if path.is_dir() else name
    if Path(base).is_dir():
        file = Path(base) / CONFIG
    else:
        file = resolve(base, revision, patterns=(CONFIG,)).path / CONFIG
    found = outline_of(read_object(file), file, str(name))
    origin = (chosen_checkpoint(path) or path) / ORIGIN
    said = read_object(origin).get("quantization") if origin.is_file() else None
    said = said["format"] if isinstance(said, dict) else said
    return found if said in (None, "none") else replace(found, quantization=said)


def outline_of(raw: Mapping[str, Any], path: Path, source: str | None = None) -> Outline:
    """Of a config.json that is read already."""
    family = family_of(raw, str(path))
    spec = family.spec(HFConfig(raw, path=str(path)))
    packed = raw.get("quantization_config")
    format = _packed(packed) if isinstance(packed, Mapping) else None
    return Outline(
        source or str(path),
        spec,
        family.rules(spec),
        _stored(raw),
        quantization=format,
        opaque=packed is not None and format is None,
    )


def beside(model: Outline, weights: str, how: str | None) -> int:
    """Bytes of the file that stay in memory although the model holds copies of them.

    A mapping lasts until nothing points into it, and the pages that were read count until then:
    those of what lies otherwise in the file (GPT-2's transposed maps, joined q, k and v), if the
    rest is mapped. Pages of what is quantized are given back at once.
    """
    if weights != model.stored or how not in (None, "lora"):
        return 0
    return WIDTHS[weights] * rearranged(model)


def originals(model: Outline, begun: str) -> int:
    """Bytes of full weights that are held all at once while adapters begin with LoftQ.

    Those that lie otherwise in the file: copies, and the pages that they were read from. Of what is
    mapped as it is, one is held at a time.
    """
    return 2 * WIDTHS[model.stored] * rearranged(model) if begun == "loftq" else 0


def rearranged(model: Outline) -> int:
    """How many numbers lie otherwise in the file than in memory, and so are copied."""
    shapes, total = parameters(model.spec), 0
    with torch.device("meta"):
        for rule in model.rules.plain:
            on_disk = rule.to_disk(lambda name: torch.empty(shapes.get(name, (1,))))
            read = {name: torch.empty(tensor.shape) for name, tensor in on_disk.items()}
            for tensor in rule.to_memory(read.__getitem__).values():
                same = tensor._is_view() or any(tensor is whole for whole in read.values())
                total += 0 if same and tensor.is_contiguous() else tensor.numel()
    return total


def _packed(said: Mapping[str, Any]) -> str | None:
    """The format of a checkpoint whose config.json has a quantization_config."""
    method = said.get("quant_method")
    if method in ("gptq", "awq"):
        return str(method) if said.get("bits", 4) == 4 else None
    if said.get("load_in_8bit"):
        return "llm-int8"
    if said.get("load_in_4bit"):
        kind = said.get("bnb_4bit_quant_type", "fp4")
        return f"{kind}-dq" if said.get("bnb_4bit_use_double_quant") else str(kind)
    return None


def _base(path: Path) -> str | Path:
    """The directory, or hub id, whose config.json describes the model that `path` leads to."""
    if not (path / CONFIG).exists():
        path = chosen_checkpoint(path) or path
    if (path / CONFIG).exists():
        return path
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no {CONFIG}; give the directory of a model, a run or an adapter"
        )
    base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} does not name its base model; give that")
    return _base(Path(base)) if Path(base).is_dir() else base


def _stored(raw: Mapping[str, Any]) -> str:
    """float32 where nothing is said: configs that old are of such weights."""
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, Mapping) else {}):
        if said := part.get("dtype") or part.get("torch_dtype"):
            return str(said).removeprefix("torch.")
    return "float32"

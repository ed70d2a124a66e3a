"""A checkpoint of random weights in a shape of ours, for what is measured from files on."""

import json
import tempfile
from pathlib import Path

import torch

from ardor.arch.decoder import Decoder
from ardor.arch.init import initialise
from ardor.families import FAMILIES
from ardor.families.hf_config import HFConfig
from ardor.files.atomic import atomic_directory
from ardor.files.weights import write_weights
from ardor.precision import dtype_of
from benchmarks import shapes


def checkpoint(model: str, dtype: str) -> Path:
    """The directory of the checkpoint, which is written if it is not there."""
    path = Path(tempfile.gettempdir()) / f"ardor-benchmarks-{model}-{dtype}"
    if path.is_dir():
        return path
    with atomic_directory(path) as folder:
        write_checkpoint(folder, model, dtype)
    return path


def write_checkpoint(folder: Path, model: str, dtype: str) -> None:
    """Its config.json and its weights, into a directory that exists."""
    config = shapes.MODELS[model] | {"dtype": dtype}
    family = FAMILIES[config["model_type"]]
    spec = family.spec(HFConfig(dict(config), path="benchmarks/shapes.py"))
    with torch.no_grad():
        decoder = Decoder(spec).to(dtype_of(dtype))
        initialise(decoder, torch.Generator().manual_seed(0))
        held = dict(decoder.named_parameters())
        write_weights(folder, family.rules(spec).to_disk(lambda name: held[name]))
        (folder / "config.json").write_text(json.dumps(config))

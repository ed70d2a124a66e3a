"""A model back into the files it came from, whole or not at all."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ardor.adapters.lora import lora_parameters
from ardor.adapters.peft_files import save_adapter
from ardor.errors import CheckpointError, ConfigError
from ardor.families.hf_config import HFConfig
from ardor.files.atomic import atomic_directory, write_atomic
from ardor.files.hub import PATTERNS
from ardor.files.json import parse_json, write_json
from ardor.files.runs import ORIGIN
from ardor.load import CONFIG, GENERATION, Model, Native
from ardor.packing import saved_config
from ardor.quant.linear import QuantizedLinear


def save_model(model: Model, directory: str | Path) -> None:
    """Write `directory` as transformers reads it; an adapted model as PEFT does (adapter only).

    An existing checkpoint is replaced in one step. What was loaded unchanged is written bitwise.

    A quantized model is written as its format's files are.

    Raises: ConfigError for a quantized model that transformers runs: its full weights are not here;
    CheckpointError if the directory holds anything that is not part of a checkpoint.
    """
    _refuse_to_remove(Path(directory), model.form.files)
    with atomic_directory(directory) as partial:
        write_files(model, partial)


def _refuse_to_remove(directory: Path, own: Iterable[str]) -> None:
    """Replacing a directory removes what is in it: that may only be an earlier checkpoint."""
    known = (*PATTERNS, ORIGIN, *(name.partition("/")[0] for name in own))
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in known)]
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise CheckpointError(
            f"{directory} also holds {shown}, which saving would remove; "
            "give a new or an empty directory"
        )


def write_files(model: Model, directory: Path) -> None:
    """The files of `save_model` into an existing directory, for whoever makes it atomic."""
    if model.adapter is not None and lora_parameters(model.decoder):  # none once it is merged
        save_adapter(
            directory,
            model.decoder,
            model.adapter,
            disk_names=model.form.disk_linears(),
            base_model=model.source,
            revision=model.revision,
        )
        record = model.quantizing.record() if model.quantizing else model.quantization
        origin: dict[str, Any] = {"quantization": record or "none"}
        needs = {"needs_trust_remote_code": True} if model.form.needs_trust else {}
        write_json(directory / ORIGIN, origin | needs)
    else:
        _write_weights(model, directory)
    if model.generation_config:
        _write_json(model, directory / GENERATION, model.generation_config)
    if model.tokenizer is not None:
        template = None if model.template is None else model.template.source
        model.tokenizer.save(directory, template)


def _write_weights(model: Model, directory: Path) -> None:
    quantized = any(isinstance(module, QuantizedLinear) for module in model.decoder.modules())
    if quantized and not isinstance(model.form, Native):
        raise ConfigError(
            f"{model.source} is loaded as {model.quantization}, without the full weights; "
            "load it without quantization to save it, or save an adapter on it"
        )
    model.form.write(model.decoder, directory)
    dtype = str(next(model.decoder.parameters()).dtype).removeprefix("torch.")
    config = dict(model.config)
    if isinstance(model.form, Native):
        config = saved_config(
            config, model.form.rules, model.decoder, model.quantizing, model.decoder.compute
        )
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    _write_json(model, directory / CONFIG, config)


def _write_json(model: Model, path: Path, value: dict[str, Any]) -> None:
    """Write `value`; byte for byte the file of that name that was read, if it says the same."""
    text = model.texts.get(path.name)
    if text is None:  # a new file, in which a null may say something too
        write_atomic(path, HFConfig(value, path=path.name).written({}))
        return
    was = HFConfig(parse_json(text, path), path=path.name, text=text)
    changes = {key: held for key, held in value.items() if was.raw.get(key, ...) != held}
    write_atomic(path, was.written(changes))

"""A model back into the files it came from, whole or not at all."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ardor.adapters.lora import lora_parameters
from ardor.adapters.peft_save import save_adapter
from ardor.errors import CheckpointError, ConfigError
from ardor.families.hf_config import HFConfig
from ardor.families.older import with_older_keys
from ardor.files.atomic import atomic_directory, write_atomic
from ardor.files.hub import PATTERNS
from ardor.files.json import parse_json, write_json
from ardor.files.runs import ORIGIN
from ardor.files.weights import MAX_SHARD_BYTES
from ardor.load import CONFIG, GENERATION, Model, Native
from ardor.packing import saved_config
from ardor.quant.linear import QuantizedLinear
from ardor.vocabulary import align


def save_model(
    model: Model, directory: str | Path, max_shard_size: int | str = MAX_SHARD_BYTES
) -> None:
    """Write `directory` as transformers reads it; an adapted model as PEFT does (adapter only).

    An existing checkpoint is replaced in one step. What was loaded unchanged is written bitwise,
    one tensor at a time; config.json gets the keys that older readers look for. Weights above
    `max_shard_size` (bytes, or "5GB", "500MiB") are spread over several files with an index.
    FP8 weights of which some were merged with an adapter are written in bfloat16, all of them. A
    quantized model is written as its format's files are.

    Raises: ConfigError for a quantized model that transformers runs, or that was FP8;
    CheckpointError if the directory holds anything that is not part of a checkpoint, or the disk
    is full: it is then as it was.
    """
    limit = shard_bytes(max_shard_size)
    _refuse_to_remove(Path(directory), model.form.files)
    with atomic_directory(directory) as partial:
        write_files(model, partial, limit)


def shard_bytes(size: int | str) -> int:
    """The bytes in 1000, "5GB" (1000s) or "5GiB" (1024s), as transformers counts them.

    Raises: ConfigError for anything else.
    """
    match = re.fullmatch(r"(\d+) *(?:([KMGT])(I?)B)?", str(size).upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"max_shard_size={size!r} is not a size; give bytes, or a number with a unit: '5GB', "
            "'500MiB'"
        )
    power = "KMGT".index(match[2]) + 1 if match[2] else 0
    return int(match[1]) * (1024 if match[3] else 1000) ** power


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


def write_files(model: Model, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
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
        if model.growths:
            _require_trained(model)
            origin["growths"] = [growth.record() for growth in model.growths]
        needs = {"needs_trust_remote_code": True} if model.form.needs_trust else {}
        write_json(directory / ORIGIN, origin | needs)
    else:
        if model.adapter is not None:
            align(model)  # what was merged may have brought a template and tokens
        _write_weights(model, directory, max_shard_bytes)
    if model.generation_config:
        _write_json(model, directory / GENERATION, model.generation_config)
    if model.tokenizer is not None:
        template = None if model.template is None else model.template.source
        model.tokenizer.save(directory, template)
        for name, variant in ({} if model.template is None else model.template.variants).items():
            write_atomic(directory / "additional_chat_templates" / f"{name}.jinja", variant.source)


def _require_trained(model: Model) -> None:
    """An adapter leaves out the rows that it does not train, and so would lose them."""
    trained = set().union(*(model.adapter.token_rows if model.adapter else {}).values())
    if left := model.untrained - trained:
        assert model.tokenizer is not None
        shown = ", ".join(repr(model.tokenizer.token(id)) for id in sorted(left)[:5])
        raise ConfigError(
            f"the rows of the added tokens {shown} are in no adapter; name their ids in "
            "trainable_token_indices, or train with method full"
        )


def _write_weights(model: Model, directory: Path, max_shard_bytes: int) -> None:
    form = model.form
    quantized = any(isinstance(module, QuantizedLinear) for module in model.decoder.modules())
    if quantized and (not isinstance(form, Native) or form.fp8 is not None):
        raise ConfigError(
            f"{model.source} is loaded as {model.quantization}, without the full weights; "
            "load it without quantization to save it, or save an adapter on it"
        )
    changed = model.form.write(model.decoder, directory, max_shard_bytes)
    dtype = str(next(model.decoder.parameters()).dtype).removeprefix("torch.")
    config = with_older_keys(model.config) | changed
    if isinstance(form, Native):
        compute = model.precision.compute
        config = saved_config(config, form.rules, model.decoder, model.quantizing, compute)
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

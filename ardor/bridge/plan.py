"""What transformers would run for a checkpoint, found by reading its files and running nothing."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardor.errors import CheckpointError, ConfigError

EXTRA = "pip install 'ardor[transformers]'"
# The classes that AutoModelForCausalLM takes from a repository; it asks for no others.
KINDS = ("AutoConfig", "AutoModelForCausalLM")


@dataclass(frozen=True)
class Plan:
    """Whose code turns the weights of a checkpoint into logits."""

    model_type: str
    classes: tuple[str, ...]
    files: tuple[Path, ...]  # of the checkpoint, all that these classes lead to; none: none is run

    def announced(self, source: str, revision: str | None) -> str:
        """For people: what is about to run, from where, and which revision of it."""
        place = f"{source}, {f'commit {revision}' if revision else 'a local directory'}"
        names = ", ".join(self.classes)
        if not self.files:
            return (
                f"{place}: {self.model_type!r} is run by transformers {_version()} ({names}); "
                "no code of the checkpoint is run"
            )
        listed = "".join(f"\n  {path}" for path in self.files)
        return f"{place}: about to run its own code ({names}), from these files:{listed}"


def plan(directory: Path, config: Mapping[str, Any]) -> Plan:
    """What will run for the checkpoint in `directory`, whose config.json is `config`.

    Raises: ConfigError if transformers is missing, does not know the model either, or would take
    code from elsewhere; CheckpointError if a file of code is missing.
    """
    _refuse(directory, config)
    classes, files = [], []
    for kind, place in _auto_map(directory, config).items():
        if kind not in KINDS:
            continue
        module, _, name = str(place).rpartition(".")
        if "--" in module or not module:
            raise ConfigError(
                f"{directory / 'config.json'}: auto_map takes {kind} from {place!r}, which is not "
                "in this repository and so of no revision that is known; put that repository's .py "
                "files beside the weights, and name them in auto_map without it"
            )
        classes.append(name)
        files += _reached(directory, module)
    if not classes:
        classes = [_native(directory, config)]
    return Plan(str(config.get("model_type")), tuple(classes), tuple(dict.fromkeys(files)))


def announce(found: Plan, source: str, revision: str | None) -> None:
    """Say on stderr what is about to run, before any of it has."""
    print(found.announced(source, revision), file=sys.stderr, flush=True)


def _refuse(directory: Path, config: Mapping[str, Any]) -> None:
    try:
        import transformers  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            f"{directory / 'config.json'}: model_type={config.get('model_type')!r} is run by "
            f"transformers, which cannot be imported ({error}); {EXTRA}"
        ) from error
    path = directory / "config.json"
    if config.get("quantization_config"):
        raise ConfigError(
            f"{path}: quantization_config is not supported for models that transformers runs; "
            "load the original weights, and give quantization='nf4'"
        )
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{path}: is_encoder_decoder=true, and only decoders are supported")
    if kernel := _downloaded_kernel(config):
        raise ConfigError(
            f"{path}: {kernel} names code on the hub, which is not of this revision; "
            "remove it from config.json"
        )


def _downloaded_kernel(config: Mapping[str, Any]) -> str | None:
    """An "..._implementation" by which transformers would fetch and run a kernel."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            held = value.values() if key.endswith("_implementation") else ()
            if any("/" in str(one) for one in held):
                return f"{key}={value!r}"
            if found := _downloaded_kernel(value):
                return found
        elif key.endswith("_implementation") and "/" in str(value):
            return f"{key}={value!r}"
    return None


def _auto_map(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("auto_map") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{directory / 'config.json'}: auto_map is {found!r}, expected names of classes by "
            f"{' and '.join(KINDS)}"
        )
    return found


def _reached(directory: Path, module: str) -> list[Path]:
    """The file of a module of the checkpoint, and all that its relative imports lead to."""
    from transformers.dynamic_module_utils import get_relative_import_files

    start = directory / f"{module}.py"
    try:
        return [start, *sorted(map(Path, get_relative_import_files(start)))]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} does not exist, which auto_map of {directory / 'config.json'} leads "
            "to; the checkpoint is not whole: copy or download its .py files"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the code beside {start} cannot be read: {error}") from error


def _native(directory: Path, config: Mapping[str, Any]) -> str:
    """The class that transformers itself has for a model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    if found is None:
        raise ConfigError(
            f"{directory / 'config.json'}: model_type={config.get('model_type')!r} is not known to "
            f"transformers {_version()} as a causal language model either, and auto_map names no "
            "code for one; check the file, or try a newer transformers"
        )
    return found if isinstance(found, str) else " or ".join(found)


def _version() -> str:
    from transformers import __version__

    return __version__

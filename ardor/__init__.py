"""Ardor: decoder-only language models, right by construction. Importing it loads nothing."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ardor.doctor import doctor
    from ardor.errors import (
        ArdorError,
        CheckpointError,
        ConfigError,
        DataError,
        ShapeError,
        TextError,
    )
    from ardor.lm import LM, clone_chat_template, load, save, setup_chat_format
    from ardor.merge import merge
    from ardor.preview import preview
    from ardor.quantize import quantize
    from ardor.tuning import finetune, finetune_run, train, train_run

__version__ = "0.1.0"

# Public name -> the module that defines it under the same name.
PUBLIC = {
    "load": "ardor.lm",
    "save": "ardor.lm",
    "LM": "ardor.lm",
    "setup_chat_format": "ardor.lm",
    "clone_chat_template": "ardor.lm",
    "doctor": "ardor.doctor",
    "preview": "ardor.preview",
    "quantize": "ardor.quantize",
    "merge": "ardor.merge",
    "train": "ardor.tuning",
    "train_run": "ardor.tuning",
    "finetune": "ardor.tuning",
    "finetune_run": "ardor.tuning",
    "ArdorError": "ardor.errors",
    "CheckpointError": "ardor.errors",
    "ConfigError": "ardor.errors",
    "DataError": "ardor.errors",
    "ShapeError": "ardor.errors",
    "TextError": "ardor.errors",
}

__all__ = [
    "LM",
    "ArdorError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ShapeError",
    "TextError",
    "clone_chat_template",
    "doctor",
    "finetune",
    "finetune_run",
    "load",
    "merge",
    "preview",
    "quantize",
    "save",
    "setup_chat_format",
    "train",
    "train_run",
]


class _Package(ModuleType):
    """Keeps `ardor.load` the function although a submodule has the same name.

    Importing a submodule binds it on its package, whoever imports it and however late; without
    this, `ardor.load` would be the function or the module depending on what ran before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'ardor' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


sys.modules[__name__].__class__ = _Package

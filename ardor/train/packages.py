"""Packages that only some settings need: imported when asked for."""

from importlib import import_module
from typing import Any

from ardor.errors import ConfigError


def package(name: str, setting: str, otherwise: str | None = None) -> Any:
    """The package `name`, for a setting; `otherwise` is another way to have it.

    Raises: ConfigError if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        more = "" if otherwise is None else f", or {otherwise}"
        raise ConfigError(
            f"{setting} needs the package {name}, which is not installed; pip install {name}{more}"
        ) from error

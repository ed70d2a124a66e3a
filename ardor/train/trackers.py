"""Metrics for other people's dashboards, beside metrics.jsonl. A package is imported when asked."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ardor.train.config import Tracker
from ardor.train.packages import package

Log = Callable[[Mapping[str, Any]], None]
"""Called with each row of metrics.jsonl."""


def trackers(names: tuple[Tracker, ...], run: Path, settings: Mapping[str, Any]) -> list[Log]:
    """One for each name.

    Raises: ConfigError if its package is not installed.
    """
    return [TRACKERS[name](run, settings) for name in dict.fromkeys(names)]


def tracker_package(name: Tracker) -> Any:
    """Raises: ConfigError if the tracker's package, which has its name, is not installed."""
    return package(name, f"report_to={name}")


def _tensorboard(run: Path, settings: Mapping[str, Any]) -> Log:
    tracker_package("tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def log(row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])
        if row["kind"] == "sample":
            writer.add_text(f"sample/{row['prompt']}", row["text"], row["step"])
        writer.flush()

    return log


def _wandb(run: Path, settings: Mapping[str, Any]) -> Log:
    return _hosted(tracker_package("wandb"), run, settings)


def _trackio(run: Path, settings: Mapping[str, Any]) -> Log:
    return _hosted(tracker_package("trackio"), run, settings)


def _hosted(package: Any, run: Path, settings: Mapping[str, Any]) -> Log:
    """Both have one interface; WANDB_PROJECT and TRACKIO_PROJECT are read by themselves."""
    made = package.init(project="ardor", name=run.resolve().name, config=dict(settings))

    def log(row: Mapping[str, Any]) -> None:
        if numbers := _numbers(row):
            made.log(numbers, step=row["step"])

    return log


TRACKERS: Mapping[Tracker, Callable[[Path, Mapping[str, Any]], Log]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("step", "kind") and isinstance(value, int | float)
    }

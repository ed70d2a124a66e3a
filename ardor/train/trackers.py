"""Metrics for other people's dashboards, beside metrics.jsonl. A package is imported when asked."""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ardor.errors import ConfigError
from ardor.files.atomic import write_atomic
from ardor.files.runs import METRICS
from ardor.train.config import Optimisation, Tracker
from ardor.train.packages import package
from ardor.train.ranks import leads
from ardor.train.report import read_metrics

Log = Callable[[Mapping[str, Any]], None]
"""Called with each row of metrics.jsonl."""
NAMES = "trackers.json"  # in a run's folder: what hosts know it by
PROJECT = "ardor"  # where WANDB_PROJECT or TRACKIO_PROJECT says no other


class Dashboard(NamedTuple):
    """One run on one dashboard."""

    log: Log
    close: Callable[[bool], None]  # whether it failed


class Begun(NamedTuple):
    """The run that a dashboard is to show."""

    folder: Path
    token: str  # the same whenever it is resumed, and no other run's
    settings: Mapping[str, Any]
    step: int  # done before: above 0, it goes on


def check_trackers(names: tuple[Tracker, ...]) -> None:
    """Refuse, before anything is read or written, what could not be sent.

    Raises: ConfigError if a package is not installed, or wandb does not know who sends.
    """
    for name in dict.fromkeys(names) if leads() else ():
        found = _package(name)
        if name == "wandb":
            with _begins(name, found):
                found.login()  # asks on a terminal; offline it is content


def open_trackers(config: Optimisation, folder: Path, step: int) -> tuple[Dashboard, ...]:
    """One for each of `report_to`; a run that is resumed goes on in the one it began.

    Raises: ConfigError if a package is not installed, or its host cannot be reached.
    """
    names = dict.fromkeys(config.report_to)
    if not names:
        return ()
    file = folder / NAMES
    token = json.loads(file.read_text())["id"] if file.exists() else secrets.token_hex(4)
    settings = json.loads(json.dumps(asdict(config), default=str))
    begun = Begun(folder, token, settings, step)
    found = tuple(TRACKERS[name](begun) for name in names)
    write_atomic(file, json.dumps({"id": token}) + "\n")
    return found


def _tensorboard(run: Begun) -> Dashboard:
    _package("tensorboard")
    # What was written after the checkpoint that a run goes on from is of steps that were lost.
    writer = import_module("torch.utils.tensorboard").SummaryWriter(
        str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None
    )
    writer.add_text("settings", _quoted(f"{k}: {v}" for k, v in run.settings.items()), run.step)

    def log(row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])
        if row["kind"] == "sample":
            text = f"{row['prompt']}{row['text']}"
            writer.add_text(f"sample/{row['prompt']}", _quoted(text.split("\n")), row["step"])
        writer.flush()

    return Dashboard(log, lambda failed: writer.close())


def _quoted(lines: Iterator[str] | list[str]) -> str:
    """As code in Markdown, so that nothing in it is taken for markup."""
    return "\n".join(f"    {line}" for line in lines)


def _wandb(run: Begun) -> Dashboard:
    wandb = _package("wandb")
    run.folder.mkdir(parents=True, exist_ok=True)
    with _begins("wandb", wandb):
        made = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.resolve().name,
            id=run.token,
            resume="allow",
            config=dict(run.settings),
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
        )
    return _hosted(wandb, made, run, lambda failed: made.finish(exit_code=int(failed)))


def _trackio(run: Begun) -> Dashboard:
    trackio = _package("trackio")
    with _begins("trackio", trackio):
        made = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # A run is known by its name there.
            name=f"{run.folder.resolve().name}-{run.token}",
            resume="allow",
            config=dict(run.settings),
        )
    return _hosted(trackio, made, run, lambda failed: trackio.finish())


def _hosted(module: Any, made: Any, run: Begun, finish: Callable[[bool], None]) -> Dashboard:
    """Both have one interface. Samples are a table of all so far, which the last one shows."""
    file = run.folder / METRICS
    before = read_metrics(file) if run.step and file.exists() else []
    samples = {
        (row["step"], row["prompt"]): row["text"] for row in before if row["kind"] == "sample"
    }

    def log(row: Mapping[str, Any]) -> None:
        shown: dict[str, Any] = _numbers(row)
        if row["kind"] == "sample":
            samples[row["step"], row["prompt"]] = row["text"]
            table = [[step, prompt, text] for (step, prompt), text in samples.items()]
            shown["samples"] = module.Table(columns=["step", "prompt", "text"], data=table)
        if shown:
            with redirect_stdout(sys.stderr):
                made.log(shown, step=row["step"])

    def close(failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            finish(failed)

    return Dashboard(log, close)


TRACKERS: Mapping[Tracker, Callable[[Begun], Dashboard]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _package(name: Tracker) -> Any:
    otherwise = "pip install 'ardor[trackers]' for all three"
    return package(name, f"report_to={name}", otherwise)


@contextmanager
def _begins(name: Tracker, module: Any) -> Iterator[None]:
    """What its packages print is a remark; what they raise is told with a remedy."""
    kinds = (OSError, RuntimeError, ValueError, getattr(module, "Error", OSError))
    remedy = {
        "wandb": "log in with wandb login, set WANDB_MODE=offline and wandb sync later",
        "trackio": "unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL to keep the run on this machine",
    }
    try:
        with redirect_stdout(sys.stderr):
            yield
    except kinds as error:
        found = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ConfigError(
            f"report_to={name} cannot begin: {found}; {remedy[name]}, or leave {name} out"
        ) from error


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("step", "kind") and isinstance(value, int | float)
    }

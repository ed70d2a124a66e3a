"""A run as people (or machines) see it: notes, a live bar, evaluations, and a clean Ctrl-C."""

import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ardor.cli.console import Progress, print_json, program, remarks
from ardor.errors import CheckpointError
from ardor.files.runs import newest_checkpoint
from ardor.train.ranks import PeerLost
from ardor.train.report import REPORT
from ardor.train.run import CONFIG, Run
from ardor.train.trainer import Trainer

SHOWN = 100  # characters of a sample


def watch(run: Run, label: str, *, json: bool = False, verb: str) -> list[Mapping[str, Any]]:
    """Run to the end, or to a clean stop on Ctrl-C; the evaluations, in order.

    Raises: KeyboardInterrupt with the command to go on with, after the checkpoint is written;
    CheckpointError with the same, if the disk is full.
    """
    console, trainer = remarks(), run.trainer
    console.quiet = not trainer.ranks.first
    json = json and trainer.ranks.first
    for note in run.notes:
        console.print(note)
    where = f"step {trainer.progress.step} of {trainer.steps}"
    console.print(f"run: {run.folder}" + (f", resumed at {where}" if run.resumed else ""))
    evaluations: list[Mapping[str, Any]] = []
    if trainer.finished:
        console.print(f"nothing left to do: the run is at {where}")
    again = f"  {program()} {verb} --config {shlex.quote(str(run.folder / CONFIG))} --resume"
    if trainer.ranks.count > 1:
        again += f"\nstarted as before, in {trainer.ranks.count} processes"
    loss = None
    with (
        _told(again),
        _stop_on_interrupt(run, again),
        Progress(label, trainer.steps, console=console) as progress,
    ):
        for event in run.events():
            if json:
                print_json(event)
            match event["kind"]:
                case "train":
                    # Smoothed, as single batches of few examples jump.
                    loss = event["loss"] if loss is None else 0.9 * loss + 0.1 * event["loss"]
                    progress.update(event["step"], loss=loss, **_shown(event))
                case "eval":
                    evaluations.append(event)
                    progress.note(f"step {event['step']}: {evaluation_line(event)}")
                case "note":
                    progress.note(f"step {event['step']}: {event['text']}")
                case "memory":
                    progress.note(memory_line(event))
                case "sample":
                    text = " ".join(f"{event['prompt']}{event['text']}".split())
                    progress.note(f"step {event['step']}: sample: {text[:SHOWN]}")
    if trainer.stopped_early:
        console.print(stopped_line(trainer))
    if not trainer.finished:
        raise KeyboardInterrupt(
            f"stopped at step {trainer.progress.step} of {trainer.steps}; go on from there with",
            again,
        )
    if not json:
        console.print(f"report: {run.folder / REPORT}")
    return evaluations


def _shown(event: Mapping[str, Any]) -> dict[str, Any]:
    """What the live line says of a step beside its loss."""
    return {
        "accuracy": event.get("rewards/accuracies"),
        "margin": event.get("rewards/margins"),
        "tokens_per_second": event["tokens_per_second"],
        "mfu": event.get("mfu"),
        "memory": event.get("memory"),
    }


def stopped_line(trainer: Trainer) -> str:
    """Why a run ended before its last step."""
    found = trainer.progress
    return (
        f"stopped early at step {found.step} of {trainer.steps}: {found.misses} evaluations were "
        f"not better than that of step {found.best_step}, {found.best_loss:.3f} nats"
    )


def memory_line(event: Mapping[str, Any]) -> str:
    """What was held at the peak, beside what was foretold."""
    peak, told = event["peak_memory"], event["predicted_memory"]
    line = f"peak memory {peak / 2**30:.2f} GiB, predicted {told / 2**30:.2f} GiB"
    if "held_before" not in event:
        return line
    return f"{line} and {event['held_before'] / 2**30:.2f} GiB that this process held before"


def evaluation_line(event: Mapping[str, Any]) -> str:
    """Held-out figures on one line."""
    if "perplexity" in event:
        line = f"held-out loss {event['loss']:.3f} nats, perplexity {event['perplexity']:,.1f}"
    else:
        line = f"held-out loss {event['loss']:.4f}, accuracy {event['rewards/accuracies']:.0%}"
        if "rewards/margins" in event:
            line += f", margin of rewards {event['rewards/margins']:.3f}"
    if "stop_rate" in event:
        line += f", stop rate {event['stop_rate']:.0%}"
    return line


@contextmanager
def _told(again: str) -> Iterator[None]:
    """Say how to go on after what stops a run from outside, such as a full disk."""
    try:
        yield
    except (CheckpointError, PeerLost) as error:
        error.add_note(f"then go on from the newest checkpoint with\n{again}")
        raise


@contextmanager
def _stop_on_interrupt(run: Run, again: str) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, end the run after the current step, with a checkpoint; twice: at once.

    SIGTERM is what schedulers send before they take a machine away.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if run.trainer.stop_requested:
            newest = newest_checkpoint(run.folder)
            if newest is None:
                raise KeyboardInterrupt(
                    "stopped at once, before a checkpoint was written; begin again with", again
                )
            raise KeyboardInterrupt(f"stopped at once; go on from {newest} with", again)
        run.trainer.stop_requested = True
        with suppress(RuntimeError):  # in the middle of a write: Python refuses another within it
            remarks().print("stopping after this step (Ctrl-C again: at once)")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

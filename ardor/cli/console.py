"""What people see: results on stdout, progress and remarks on stderr, plain when piped."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

PLAIN_WIDTH = 100  # columns of a table in a pipe
QUIET = 2.0  # seconds before a wait has a bar
NARROW = 70  # columns of a terminal that has no room for the bar itself


def results() -> Console:
    """The console on stdout."""
    return _console(stderr=False)


def remarks() -> Console:
    """The console on stderr, for everything that is not the result."""
    return _console(stderr=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit with 1 here: `main` says how a closed pipe ends."""
        raise


def _console(*, stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return _Console(
        stderr=stderr,
        width=None if terminal else PLAIN_WIDTH,
        soft_wrap=not terminal,  # a pipe gets whole lines
        markup=False,  # texts of models and users contain [brackets]
        emoji=False,
        highlight=False,
    )


def program() -> str:
    """What to type to run this program again: its name where that is on the path, else the file."""
    started, found = Path(sys.argv[0]), shutil.which("ardor")
    if started.name != "ardor" or (found and Path(found).resolve() == started.resolve()):
        return "ardor"
    return os.path.relpath(started)


def print_json(value: Any) -> None:
    """One JSON document on stdout, on one line."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


class Progress:
    """A live bar with loss, tokens/s and time left; a plain line now and then when not a terminal.

    >>> with Progress("training", total=400) as progress:
    ...     progress.update(step, loss=loss, tokens_per_second=rate)
    ...     progress.note("a sample")  # above the bar

    Time left counts from the first update, so that a resumed run and a slow start do not mislead.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        console: Console | None = None,
        interval: float = 5.0,  # seconds between plain lines
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total = label, total
        self.console = console or remarks()
        self._interval, self._clock = interval, clock
        self._started: tuple[float, int] | None = None  # when, and at which step
        self._printed = float("-inf")
        self._bar = self._make_bar() if self.console.is_terminal else None
        self._task = self._bar.add_task(label, total=total, facts="") if self._bar else None

    def _make_bar(self) -> Bar:
        whole = Column(no_wrap=True, overflow="ellipsis")
        facts = TextColumn("{task.fields[facts]}", table_column=whole)
        if self.console.width < NARROW:
            count = "{task.description} {task.completed}/{task.total} {task.fields[facts]}"
            return Bar(TextColumn(count, table_column=whole), console=self.console)
        parts = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()
        return Bar(*parts, facts, console=self.console, expand=True)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        margin: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        memory: int | None = None,
    ) -> None:
        """Show that `step` steps are done; the last step always prints."""
        now = self._clock()
        if self._started is None:
            self._started = (now, step)
        facts = "  ".join(
            [
                *([] if loss is None else [f"loss {loss:.3f}"]),
                *([] if accuracy is None else [f"accuracy {accuracy:.0%}"]),
                *([] if margin is None else [f"margin {margin:.3f}"]),
                *([] if tokens_per_second is None else [f"{tokens_per_second:,.0f} tokens/s"]),
                *([] if mfu is None else [f"MFU {mfu:.0%}"]),
                *([] if memory is None else [f"{memory / 2**30:.1f} GiB"]),
                *self._left(now, step),
            ]
        )
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif now - self._printed >= self._interval or step >= self.total:
            self._printed = now
            self.console.print(f"{self.label}  {step}/{self.total}  {facts}".rstrip(), markup=False)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self.console.print(text, markup=False)

    def _left(self, now: float, step: int) -> list[str]:
        assert self._started is not None
        began, first = self._started
        if not first < step < self.total:
            return []
        return [f"{duration((now - began) / (step - first) * (self.total - step))} left"]


class Late:
    """A bar that comes only once there is something to wait for."""

    def __init__(self, label: str, *, unit: int = 1):
        self._label, self._unit = label, unit
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Late":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)

    def update(self, done: int, total: int) -> None:
        if self._bar is None and time.monotonic() - self._began < QUIET:
            return
        if self._bar is None:
            self._bar = Progress(self._label, -(-total // self._unit)).__enter__()
        self._bar.update(-(-done // self._unit))


def duration(seconds: float) -> str:
    """12s, 3m05s or 2h07m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, seconds_left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{seconds_left:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m"

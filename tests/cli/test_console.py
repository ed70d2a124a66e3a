"""Progress on a terminal, in a pipe and in a narrow window."""

import io
import json

import pytest
from rich.console import Console

from ardor.cli.console import Progress, duration, print_json, results


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def run(console, steps=20, seconds_per_step=1.0):
    clock = Clock()
    with Progress("training", steps, console=console, interval=5.0, clock=clock) as progress:
        for step in range(1, steps + 1):
            clock.seconds += seconds_per_step
            progress.update(step, loss=4 - step / 10, tokens_per_second=1234.5)
        progress.note("[sample] text")
    return console.file.getvalue()


def test_a_pipe_gets_a_plain_line_now_and_then():
    lines = run(Console(file=io.StringIO(), width=100)).splitlines()
    assert lines == [
        "training  1/20  loss 3.900  1,234 tokens/s",
        "training  6/20  loss 3.400  1,234 tokens/s  14s left",
        "training  11/20  loss 2.900  1,234 tokens/s  9s left",
        "training  16/20  loss 2.400  1,234 tokens/s  4s left",
        "training  20/20  loss 2.000  1,234 tokens/s",
        "[sample] text",
    ]


def test_time_left_ignores_steps_of_an_earlier_run():
    clock = Clock()
    console = Console(file=io.StringIO(), width=100)
    progress = Progress("training", 100, console=console, interval=0.0, clock=clock)
    progress.update(90)
    clock.seconds = 2.0
    progress.update(92)
    assert console.file.getvalue().splitlines()[-1] == "training  92/100  8s left"


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_terminal_gets_a_bar_that_fits(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    shown = run(console)
    assert "\x1b[" in shown
    assert "training" in shown
    assert "20/20" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3.0, "0s"), (59.4, "59s"), (185.0, "3m05s"), (3599.9, "1h00m"), (7620.0, "2h07m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_results_in_a_pipe_are_whole_lines_without_markup(capsys):
    line = "[bold]x[/bold] :smile: " + "word " * 60
    results().print(line)
    assert capsys.readouterr().out == line.rstrip(" ") + " \n"


def test_print_json_is_one_line(capsys):
    print_json({"text": "é\n"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "é\n"}

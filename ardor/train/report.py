"""report.html: a run's curves, samples, first rows and settings in one page that needs no other.

Curves are SVG stretched to their box, in units of one thousandth; labels are HTML above it, so that
text keeps its size on a narrow screen.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ardor.data.shown import Document
from ardor.data.shown_page import LEGEND, article
from ardor.data.shown_page import STYLE as ROWS_STYLE
from ardor.errors import CheckpointError
from ardor.files.atomic import write_atomic
from ardor.files.page import page, table, tiles
from ardor.files.yaml import read_yaml
from ardor.memory.machine import shown
from ardor.train.first_rows import read_first_rows

Row = dict[str, Any]
REPORT = "report.html"
POINTS = 400  # drawn at most per curve: more cannot be told apart


class Curve(NamedTuple):
    name: str
    style: str  # a CSS class of STYLE
    points: list[tuple[float, float]]  # (step, value)


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html from the files of the run, and return its path.

    Raises: CheckpointError if there are no metrics or a line of them is damaged. A last line
    without an end is what a killed run leaves, and is passed over.
    """
    run = Path(run_dir)
    rows = read_metrics(run / "metrics.jsonl")
    config = run / "config.yaml"
    settings = read_yaml(config).values if config.exists() else {}
    target = run / REPORT
    write_atomic(target, render(run.resolve().name, rows, settings, read_first_rows(run)))
    return target


def read_metrics(path: Path) -> list[Row]:
    """The rows in order of step; where a resumed run repeats a step, the later row counts.

    Raises: CheckpointError as `write_report` says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"no metrics at {path}; expected the folder of a run") from None
    whole, _, _ = text.rpartition("\n")
    kept: dict[tuple[str, int, str], Row] = {}
    # Not splitlines: U+2028 in a sample is a line end to it, and not to JSON Lines.
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            row = json.loads(line)
            key = (str(row["kind"]), int(row["step"]), str(row.get("prompt", "")))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected an object with step and kind, found "
                f"{line[:60]!r}; delete the line to see the rest"
            ) from error
        kept[key] = row
    return sorted(kept.values(), key=lambda row: row["step"])


def render(name: str, rows: Sequence[Row], settings: Row, data: Sequence[Document] = ()) -> str:
    """The page. `rows` as in metrics.jsonl, ordered by step, `data` what the run trains on first;
    every text in it is escaped."""
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    samples = [row for row in rows if row["kind"] == "sample"]
    judged = bool(_series(train, "rewards/accuracies"))
    curves = [
        chart(
            "Loss, per pair or answer" if judged else "Loss, nats per token",
            [
                *_noisy(_series(train, "loss"), ("each step", "smoothed")),
                Curve("held-out", "eval", _series(evals, "loss")),
            ],
            wide=True,
        ),
        *(_compared(title, key, train, evals) for title, key in JUDGED),
        chart("Learning rate", [Curve("", "train", thinned(_series(train, "learning_rate")))]),
        chart("Tokens per second", _noisy(_series(train, "tokens_per_second"))),
        chart("MFU: share of what the device can do", _noisy(_series(train, "mfu"))),
        chart("Gradient norm", _noisy(_series(train, "grad_norm"))),
        chart("Stop rate of answers", [Curve("", "eval", _series(evals, "stop_rate"))]),
    ]
    lost = sum(1 for row in train if not _finite(row.get("loss")))
    bad = [f"Steps without a finite loss: {lost}."] if lost else []
    bad += [f"Stopped: {row['text']}" for row in rows if row["kind"] == "stopped"]
    warning = "".join(f'<p class="bad">{escape(text)}</p>' for text in bad)
    body = [
        f"<h1>{escape(name)}</h1>",
        _tiles(train, evals, _series(rows, "peak_memory")),
        warning,
        f'<div class="charts">{"".join(curves)}</div>',
        _samples(samples),
        _data(data),
        _settings(settings),
    ]
    return page(name, body, ROWS_STYLE + STYLE)


JUDGED = (
    ("Accuracy: the better answer has the higher reward", "rewards/accuracies"),
    ("Margin of rewards", "rewards/margins"),
    ("Reward of good answers", "rewards/chosen"),
    ("Reward of bad answers", "rewards/rejected"),
    ("Log-probability of good answers, nats", "logps/chosen"),
)


def _compared(title: str, key: str, train: Sequence[Row], evals: Sequence[Row]) -> str:
    held_out = Curve("held-out", "eval", _series(evals, key))
    return chart(title, [*_noisy(_series(train, key), ("each step", "smoothed")), held_out])


def chart(title: str, curves: Iterable[Curve], *, wide: bool = False) -> str:
    """Curves over one pair of axes; "" when none has a point. All but a `wide` one show zero."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left, right = _span(min(xs), max(xs))
    bottom, top = _span(min(ys) if wide else min(0.0, *ys), max(ys))
    margin = (top - bottom) / 25
    bottom, top = bottom - margin * wide, top + margin

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def down(y: float) -> float:
        return 1 - (y - bottom) / (top - bottom)

    x_ticks = [x for x in ticks(left, right) if x == int(x)]
    y_ticks = ticks(bottom, top)
    lines = "".join(f'<path class="grid" d="M0 {1000 * down(y):.1f}H1000"/>' for y in y_ticks)
    paths = "".join(_path(curve, across, down) for curve in curves)
    labels = "".join(
        f'<span class="y" style="top:{100 * down(y):.2f}%">{number(y)}</span>' for y in y_ticks
    ) + "".join(
        f'<span class="x" style="left:{100 * across(x):.2f}%">{number(x)}</span>' for x in x_ticks
    )
    named = [curve for curve in curves if curve.name]
    legend = "".join(f'<span class="key {c.style}">{escape(c.name)}</span>' for c in named)
    last = ", ".join(f"{curve.name} {number(curve.points[-1][1])}".strip() for curve in curves)
    return (
        f'<figure class="{"wide" if wide else ""}"><figcaption>{escape(title)}'
        f'<span class="legend">{legend}</span></figcaption><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}; at the end: {escape(last)}">{lines}{paths}</svg>'
        f"{labels}</div></figure>"
    )


def _path(curve: Curve, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    at = [f"{1000 * across(x):.1f} {1000 * down(y):.1f}" for x, y in curve.points]
    path = f'<path class="{curve.style}" d="M{"L".join(at)}"/>'
    if len(at) > 60:
        return path
    # A line of no length with round ends is a dot that stretching does not squash.
    return path + f'<path class="{curve.style} dots" d="{"".join(f"M{p}h0" for p in at)}"/>'


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within low..high, which must differ."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a window of a twentieth of the run around each point.

    Around it, not before it: an average of the past lags, and would draw a falling training loss
    above the held-out one.
    """
    reach = len(points) // 40
    sums = [0.0, *accumulate(y for _, y in points)]
    result = []
    for at, (x, _) in enumerate(points):
        near = min(reach, at, len(points) - 1 - at)
        result.append((x, (sums[at + near + 1] - sums[at - near]) / (2 * near + 1)))
    return result


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about POINTS points: the lowest and the highest of each stretch, in order."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(2 * len(points) / POINTS)
    result = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        result += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return result if result[-1] == points[-1] else [*result, points[-1]]


def number(value: float) -> str:
    """Short, for an axis: 12.5k, 2.41, 3e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e3:
        return f"{value / 1e3:.4g}k"
    if abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _noisy(points: list[tuple[float, float]], names: tuple[str, str] = ("", "")) -> list[Curve]:
    each, mean = names
    return [
        Curve(each, "faint", thinned(points)),
        Curve(mean, "train", thinned(smoothed(points))),
    ]


def _series(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if _finite(row.get(key))]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _span(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _tiles(train: Sequence[Row], evals: Sequence[Row], peak: Sequence[tuple[float, float]]) -> str:
    facts: list[tuple[str, str]] = []
    if train:
        facts.append(("steps", f"{train[-1]['step']:,}"))
    if loss := _series(train, "loss"):
        recent = [value for _, value in loss[-max(1, len(loss) // 20) :]]
        facts.append(("recent training loss", f"{sum(recent) / len(recent):,.3f}"))
    held_out = _series(evals, "loss")
    if held_out:
        facts.append(("held-out loss", f"{held_out[-1][1]:.3f}"))
        if accuracy := _series(evals, "rewards/accuracies"):
            facts.append(("held-out accuracy", f"{accuracy[-1][1]:.0%}"))
        else:
            facts.append(("perplexity", f"{math.exp(min(held_out[-1][1], 700.0)):,.4g}"))
        step, best = min(held_out, key=lambda point: point[1])
        if best < held_out[-1][1]:
            facts.append((f"best, step {step:,.0f}", f"{best:.3f}"))
    if stop := _series(evals, "stop_rate"):
        facts.append(("stop rate", f"{stop[-1][1]:.0%}"))
    if speed := sorted(value for _, value in _series(train, "tokens_per_second")):
        facts.append(("tokens/s, median", f"{speed[len(speed) // 2]:,.0f}"))
    if peak:
        facts.append(("peak memory", shown(int(peak[-1][1]))))
    return tiles(facts) if facts else "<p>Nothing was logged yet.</p>"


def _samples(samples: Sequence[Row]) -> str:
    """The first and the last of each prompt side by side, and those between them folded."""
    if not samples:
        return ""
    steps = sorted({row["step"] for row in samples})
    ends = dict.fromkeys((steps[0], steps[-1]))
    prompts = dict.fromkeys(str(row.get("prompt", "")) for row in samples)
    texts = {(row["step"], str(row.get("prompt", ""))): str(row.get("text", "")) for row in samples}

    def quotes(prompt: str, chosen: Iterable[int]) -> str:
        return "".join(
            f"<div><h3>Step {step:,}</h3><blockquote><b>{escape(prompt)}</b>"
            f"{escape(texts[step, prompt])}</blockquote></div>"
            for step in chosen
            if (step, prompt) in texts
        )

    shown = "".join(f'<div class="samples">{quotes(prompt, ends)}</div>' for prompt in prompts)
    between = [step for step in steps if step not in ends]
    folded = "".join(quotes(prompt, between) for prompt in prompts)
    if folded:
        folded = f"<details><summary>Between them</summary>{folded}</details>"
    return f"<h2>Samples</h2>{shown}{folded}"


def _data(rows: Sequence[Document]) -> str:
    if not rows:
        return ""
    return f"<h2>Data, as it is trained on</h2>{LEGEND}{''.join(map(article, rows))}"


def _settings(settings: Row) -> str:
    if not settings:
        return ""
    rows = ((key, _shown(value)) for key, value in settings.items())
    return f"<h2>Settings</h2>{table(rows)}"


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


STYLE = """
h3 { margin: 12px 0 6px; font-size: 14px; font-weight: 400; color: var(--soft); }
figure, blockquote { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.charts { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
figure { margin: 0; padding: 12px 16px 8px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px;
  font-size: 14px; font-weight: 600; }
.legend { font-weight: 400; color: var(--soft); }
.key { margin-left: 14px; white-space: nowrap; }
.legend .key:first-child { margin-left: 0; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; background: var(--train); }
.key.eval::before { background: var(--eval); }
.key.faint::before { opacity: 0.35; }
.plot { position: relative; height: 170px; margin: 14px 8px 26px 48px; }
.wide .plot { height: 300px; }
svg { width: 100%; height: 100%; overflow: visible; }
path { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.train, path.faint { stroke: var(--train); }
path.eval { stroke: var(--eval); }
path.faint { stroke-width: 1; opacity: 0.35; }
path.dots { stroke-width: 6; stroke-linecap: round; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
summary { margin: 8px 0; color: var(--soft); cursor: pointer; }
.samples { display: grid; gap: 0 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.samples > div { min-width: 0; }
blockquote { margin: 0 0 8px; max-height: 20em; overflow: auto; overflow-wrap: anywhere;
  padding: 10px 14px; white-space: pre-wrap;
  font: 13px/1.5 ui-monospace, monospace; }
blockquote b { color: var(--train); }
"""

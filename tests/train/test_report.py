"""report.html says what metrics.jsonl says, alone, and nothing in it can act."""

import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from ardor.errors import CheckpointError, ConfigError
from ardor.train.report import POINTS, number, read_metrics, smoothed, thinned, ticks, write_report


def row(step, kind="train", **facts):
    return {"step": step, "kind": kind, **facts}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run <1>"
    folder.mkdir()

    def write(rows, config="model: a<b>\nseed: null\ntarget_modules: [q, v]\n"):
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / "metrics.jsonl").write_text(text)
        if config:
            (folder / "config.yaml").write_text(config)
        return folder

    return write


ROWS = [
    *(row(n, loss=5 / n, learning_rate=1e-3, tokens_per_second=900 + n) for n in range(1, 21)),
    row(10, "eval", loss=0.4, perplexity=1.49, stop_rate=0.5),
    row(20, "eval", loss=0.5, perplexity=1.65, stop_rate=0.75),
    row(10, "sample", prompt="def f(", text="early"),
    row(20, "sample", prompt="def f(", text="<script>alert('x')</script> & late"),
    row(20, "checkpoint", path="checkpoint-20"),
]


class Page(HTMLParser):
    """Collects tags, and refuses a page whose tags do not pair."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in (*self.VOID, "path"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_the_runs_numbers_curves_samples_and_settings(run):
    folder = run(ROWS)
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text())
    assert page.tags.count("svg") == 4  # loss, learning rate, speed, stop rate; no gradient norms
    tiles = ["20steps", "0.500held-out loss", "1.649perplexity", "0.400best, step 10"]
    tiles += ["75%stop rate", "911tokens/s, median"]
    for text in ["run <1>", *tiles, "a<b>", '["q", "v"]', "Step 20"]:
        assert text in page.text, text


def test_a_prompt_is_shown_before_and_after_and_what_is_between_is_folded(run):
    rows = [row(1, loss=3.0)]
    rows += [
        row(step, "sample", prompt=prompt, text=f" {prompt}-{step}")
        for step in (0, 5, 9)
        for prompt in "AB"
    ]
    html = write_report(run(rows)).read_text()
    shown, folded = html.split("<details>")
    assert "A-5" not in shown and "A-5" in folded and "B-5" in folded
    places = [shown.index(text) for text in ("A-0", "A-9", "B-0", "B-9")]
    assert places == sorted(places)
    once = write_report(run([row(1, loss=3.0), row(1, "sample", prompt="C", text=" only")]))
    assert once.read_text().count("only") == 1 and "<details>" not in once.read_text()


def test_how_much_of_the_device_was_used_and_why_a_run_was_stopped_are_said(run):
    rows = [row(1, loss=3.0, mfu=0.25), row(1, "memory", peak_memory=3 * 2**29)]
    rows += [row(1, "stopped", text="the loss <jumped>")]
    page = Page(write_report(run(rows)).read_text())
    for text in ("MFU", "1.5 GiBpeak memory", "Stopped: the loss <jumped>"):
        assert text in page.text, text


def test_nothing_in_the_page_runs_or_loads(run):
    text = write_report(run(ROWS)).read_text()
    page = Page(text)
    assert "<script>alert('x')</script> & late" in page.text  # shown, as text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & set(page.attributes)
    assert "http" not in text
    assert "@import" not in text
    assert Page("<a href='x'></a>").attributes == ["href"]  # the probe can see one


def test_colors_follow_the_readers_preference(run):
    assert "prefers-color-scheme: dark" in write_report(run(ROWS)).read_text()


def test_a_run_without_config_samples_or_evaluations_still_has_a_page(run):
    page = Page(write_report(run([row(1, loss=3.0)], config="")).read_text())
    assert page.tags.count("svg") == 1
    assert "Settings" not in page.text
    assert "Nothing was logged yet." in Page(write_report(run([])).read_text()).text


def test_a_loss_that_is_not_finite_is_said_and_not_drawn(run):
    rows = [row(1, loss=3.0), row(2, loss=math.nan), row(3, loss=math.inf), row(4, loss=2.0)]
    text = write_report(run(rows)).read_text()
    assert "Steps without a finite loss: 2." in text
    assert "nan" not in Page(text).text


def test_a_resumed_run_counts_the_later_row(run):
    folder = run([row(1, loss=3.0), row(2, loss=9.0), row(2, loss=2.0), row(2, "eval", loss=1.0)])
    rows = read_metrics(folder / "metrics.jsonl")
    assert [(r["step"], r["kind"], r["loss"]) for r in rows] == [
        (1, "train", 3.0),
        (2, "train", 2.0),
        (2, "eval", 1.0),
    ]


def test_a_line_cut_short_by_a_kill_is_passed_over(run):
    folder = run([row(1, loss=3.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == [1]


def test_a_sample_may_hold_what_unicode_calls_a_line_end(run):
    rows = [row(1, loss=3.0), row(1, "sample", prompt="a", text="b\u2028c\x85d")]
    folder = run([])
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]  # as Metrics writes them
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    assert [r["kind"] for r in read_metrics(folder / "metrics.jsonl")] == ["train", "sample"]


def test_a_long_setting_breaks_between_its_words(run):
    text = write_report(run(ROWS, config="per_device_batch: 1\n")).read_text()
    assert "<th>per_<wbr/>device_<wbr/>batch</th>" in text
    assert "per_device_batch" in Page(text).text  # as it is copied


@pytest.mark.parametrize("line", ['{"step": 2, "lo', '{"step": 1}', "[1]", '{"step": null}'])
def test_a_damaged_line_is_named(run, line):
    folder = run([row(1, loss=3.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: expected an object with"):
        write_report(folder)


def test_a_folder_that_is_no_run_and_a_broken_config_are_named(run, tmp_path):
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml, line 2"):
        write_report(run(ROWS, config="a: [\n"))


def test_smoothing_keeps_a_line_and_does_not_lag():
    line = [(float(x), 3.0 * x) for x in range(200)]
    for (_, got), (_, expected) in zip(smoothed(line), line, strict=True):
        assert got == pytest.approx(expected)
    noise = [(float(x), (-1.0) ** x) for x in range(200)]
    assert max(abs(y) for _, y in smoothed(noise)[20:-20]) < 0.2


def test_thinning_keeps_peaks_ends_and_order():
    points = [(float(x), 100.0 if x == 5001 else math.sin(x)) for x in range(10_000)]
    few = thinned(points)
    assert len(few) <= POINTS + 4
    assert (5001.0, 100.0) in few
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert few == sorted(few)


@pytest.mark.parametrize("low", [0.0, -3.0, 1.9, 1e5])
@pytest.mark.parametrize("length", [1e-6, 0.7, 1.0, 33.0, 1e7])
def test_ticks_are_few_even_and_inside(low, length):
    found = ticks(low, low + length)
    assert 3 <= len(found) <= 7
    slack = 1e-6 * length
    assert low - slack <= found[0] < found[-1] <= low + length + slack
    gaps = [b - a for a, b in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-4)


SHORT = {0.0: "0", 2.41: "2.41", 12_500.0: "12.5k", 3e6: "3M", 2e-5: "2e-5", -0.0015: "-1.5e-3"}


@pytest.mark.parametrize(("value", "text"), SHORT.items())
def test_numbers_on_axes_are_short(value, text):
    assert number(value) == text

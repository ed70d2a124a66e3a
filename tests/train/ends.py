"""What a run left, compared with what another one did."""

import json
from pathlib import Path

from ardor.files.runs import BEST, checkpoints, newest_checkpoint
from ardor.files.yaml import read_yaml
from ardor.load import load_model
from ardor.train.checkpoint import read_checkpoint
from ardor.train.first_rows import read_first_rows
from ardor.train.report import read_metrics, render

from .conftest import figures


def again(run: Path, args: list[str]) -> list[str]:
    """The command that goes on with a run, or `args` if it was killed before it had a folder."""
    if (run / "config.yaml").exists():
        return [args[0], "--config", str(run / "config.yaml"), "--resume"]
    return args


def assert_only_whole_checkpoints(run: Path) -> None:
    for checkpoint in checkpoints(run):
        progress, _ = read_checkpoint(checkpoint)
        assert checkpoint.name == f"checkpoint-{progress.step}"
        load_model(checkpoint)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every file; of the trainer's record all but the length of metrics.jsonl, which has times."""
    found = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    record = json.loads(found["trainer.json"])
    del record["metrics_bytes"]
    found["trainer.json"] = json.dumps(record).encode()
    return found


def assert_same_end(run: Path, whole: Path) -> None:
    """The last checkpoint bitwise, every figure of the metrics, and nothing left half done."""
    last, other = newest_checkpoint(run), newest_checkpoint(whole)
    assert last is not None and other is not None and last.name == other.name
    ours, theirs = contents(last), contents(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert figures(run) == figures(whole)
    # One more: killed after the last was written, before the oldest went.
    kept = {path.name for path in checkpoints(whole)}
    assert kept <= {path.name for path in checkpoints(run)}
    assert len(checkpoints(run)) <= len(kept) + 1
    best = [(folder / BEST).read_text() for folder in (run, whole) if (folder / BEST).exists()]
    assert len(best) in (0, 2) and len({*best}) < 2
    rows, settings = read_metrics(run / "metrics.jsonl"), read_yaml(run / "config.yaml").values
    page = render(run.resolve().name, rows, settings, read_first_rows(run))
    assert (run / "report.html").read_text() == page
    # None where it was killed between its last step and that row: nobody else has measured it.
    assert (run / "metrics.jsonl").read_text().count('"kind": "memory"') <= 1
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]

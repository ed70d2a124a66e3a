"""`ardor doctor MODEL`."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ardor.cli.console import Progress, print_json, remarks, results

if TYPE_CHECKING:
    from ardor.doctor import Report

QUIET = 2.0  # seconds without a sign of progress
MIB = 1 << 20
STYLES = {"E": "bold red", "W": "yellow", "I": "dim"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Look for what is wrong with a checkpoint: files, config, shapes, weights, tokenizer.

    Ends with 0 if nothing is wrong, 1 for warnings, 2 for errors.
    """

    model: str
    """Hub id, local directory, or the folder of a run."""
    weights: bool = True
    """Read every weight, one tensor at a time; --no-weights: only the files' headers."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    use_safetensors: bool = True
    """Weights from safetensors; --no-use-safetensors: from pickles (.bin), tensors alone."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    from ardor.doctor import doctor  # later: help needs no torch
    from ardor.doctor.finding import WORDS

    with _Late() as shown:
        report = doctor(
            config.model,
            weights=config.weights,
            revision=config.revision,
            use_safetensors=config.use_safetensors,
            progress=shown.update,
        )
    code = 2 if report.count("E") else 1 if report.count("W") else 0
    if config.json:
        counts = {word: report.count(level) for level, word in WORDS.items()}
        print_json(asdict(report) | {"counts": counts, "exit_code": code})
    else:
        _show(report)
    return code


class _Late:
    """A bar that comes only once there is something to wait for."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "_Late":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)

    def update(self, read: int, total: int) -> None:
        if self._bar is None and time.monotonic() - self._began < QUIET:
            return
        if self._bar is None:
            self._bar = Progress("reading weights (MiB)", -(-total // MIB)).__enter__()
        self._bar.update(-(-read // MIB))


def _show(report: "Report") -> None:
    from rich.table import Table
    from rich.text import Text

    from ardor.doctor.finding import WORDS, many

    console = results()
    if report.findings:
        table = Table(box=None, padding=(0, 1, 1, 0), pad_edge=False)
        table.add_column("level", no_wrap=True)
        table.add_column("rule", no_wrap=True)
        table.add_column("finding", overflow="fold")
        for finding in report.findings:
            text = Text(finding.what, style="bold")
            text.append(f"\n{finding.evidence}\nfix: {finding.fix}", style="not bold")
            level = Text(WORDS[finding.level], style=STYLES[finding.level])
            table.add_row(level, finding.rule, text)
        console.print(table, soft_wrap=False)
    console.print(
        f"{report.path}: {many(report.count('E'), 'error')}, "
        f"{many(report.count('W'), 'warning')}, {many(report.count('I'), 'remark')} "
        f"by {len(report.rules)} rules"
    )
    remarks().print(
        f"{report.tensors:,} tensors read, {report.bytes / 2**30:.2f} GiB, {report.seconds:.1f} s"
    )

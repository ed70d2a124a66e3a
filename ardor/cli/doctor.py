"""`ardor doctor MODEL`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardor.cli.console import Late, print_json, remarks, results
from ardor.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ardor.doctor import Report

MIB = 1 << 20
BAR = 40  # characters of the longest bar of a histogram
STYLES = {"E": "bold red", "W": "yellow", "I": "dim"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Look for what is wrong with a model: files, weights, tokens, template; with data; with a run.

    Ends with 0 if nothing is wrong, 1 for warnings, 2 for errors; with --fix, as the copy is.
    """

    model: str
    """Hub id, local directory, adapter, or the folder of a run."""
    data: str | None = None
    """Data to look at as this model would be trained on it."""
    eval_data: str | None = None
    """Held-out data: rows and prompts of it that are in --data are told."""
    run: Path | None = None
    """Folder of a run to look at beside the model. Default: the model, if it is one."""
    fix: bool = False
    """Write a copy with what has a mechanical repair repaired; the original stays as it is."""
    output: Path | None = None
    """New folder for the repaired copy."""
    weights: bool = True
    """Read every weight, one tensor at a time; --no-weights: only the files' headers."""
    probe: bool | None = None
    """Load the model and let it answer: does it stop, do batches change it. Default: if it has at
    most 512 MiB of weights and no errors."""
    rows: int = 10_000
    """Rows of the data that are looked at."""
    max_length: int | None = None
    """Tokens of an example above which it is told as too long. Default: the model's positions."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    use_safetensors: bool = True
    """Weights from safetensors; --no-use-safetensors: from pickles (.bin), tensors alone."""
    trust_remote_code: bool = False
    """Let transformers run a model that Ardor does not know, for the probe."""
    json: bool = False
    """Print one JSON document."""

    def __post_init__(self) -> None:
        if self.fix != (self.output is not None):
            raise ConfigError("--fix writes a copy, to the folder -o names: give both or neither")
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows} must be at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length={self.max_length} must be at least 1")
        if self.eval_data is not None and self.data is None:
            raise ConfigError("eval_data is compared with data; give --data too")


def run(config: Config) -> int:
    from ardor.doctor import doctor  # later: help needs no torch

    with Late("reading weights (MiB)", unit=MIB) as shown:
        report = doctor(
            config.model,
            data=config.data,
            eval_data=config.eval_data,
            run=config.run,
            weights=config.weights,
            probe=config.probe,
            rows=config.rows,
            max_length=config.max_length,
            fix=config.output,
            revision=config.revision,
            use_safetensors=config.use_safetensors,
            trust_remote_code=config.trust_remote_code,
            progress=shown.update,
        )
    if config.json:
        print_json(_document(report))
    else:
        _show(report)
    return report.exit_code


def _document(report: "Report") -> dict[str, Any]:
    from ardor.doctor.finding import WORDS

    data, probe, repaired = report.data, report.probe, report.repaired
    found: dict[str, Any] = {
        "path": str(report.path),
        "findings": [asdict(finding) for finding in report.findings],
        "counts": {word: report.count(level) for level, word in WORDS.items()},
        "exit_code": report.exit_code,
        "rules": report.rules,
        "facts": dict(report.facts),
        "tensors": report.tensors,
        "bytes": report.bytes,
        "seconds": report.seconds,
        "probe_note": report.probe_note,
    }
    if data is not None:
        found["data"] = {
            "rows": data.rows,
            "more": data.more,
            "formats": dict(data.formats),
            "examples": len(data.lengths),
            "tokens": data.tokens,
            "targets": data.targets,
            "characters": data.characters,
            "lengths": dict(data.histogram()),
        }
    if probe is not None:
        found["probe"] = asdict(probe) | {"compute": str(probe.compute).removeprefix("torch.")}
    if repaired is not None:
        copy = _document(repaired.report)
        found["repaired"] = {"rules": repaired.rules, "path": str(repaired.path), "copy": copy}
    return found


def _show(report: "Report") -> None:
    from ardor.doctor.finding import many

    console = results()
    _show_findings(report, console)
    _show_facts(report, console)
    console.print(
        f"{report.path}: {many(report.count('E'), 'error')}, "
        f"{many(report.count('W'), 'warning')}, {many(report.count('I'), 'remark')} "
        f"by {len(report.rules)} rules"
    )
    remarks().print(
        f"{report.tensors:,} tensors read, {report.bytes / 2**30:.2f} GiB, {report.seconds:.1f} s; "
        f"probe: {report.probe_note}"
    )
    if report.repaired is not None:
        names = ", ".join(report.repaired.rules) or "nothing: no finding has a mechanical repair"
        console.print(f"\nrepaired in {report.repaired.path}: {names}")
        _show(report.repaired.report)


def _show_findings(report: "Report", console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    from ardor.doctor.finding import WORDS

    if not report.findings:
        return
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


def _show_facts(report: "Report", console: "Console") -> None:
    """What the files say, the lengths of the rows, and how the answers of a probe ended."""
    from rich.table import Table
    from rich.text import Text

    lines = [*report.facts]
    if (data := report.data) is not None and data.lengths:
        kinds = ", ".join(f"{count:,} {name}" for name, count in data.formats.items())
        lines.append(("rows", f"{'the first ' if data.more else ''}{data.rows:,}: {kinds}"))
        mean = data.tokens / len(data.lengths)
        share = data.targets / max(1, data.tokens)
        lines.append(("tokens", f"{data.tokens:,}, {mean:.1f} an example; {share:.0%} are targets"))
        most = max(count for _, count in data.histogram())
        for name, count in data.histogram():
            lines.append((f"  {name}", f"{'#' * -(-BAR * count // most)} {count:,}"))
    if report.probe is not None:
        for answer in report.probe.answers:
            ended = answer.stop_reason.replace("_", " ")
            text = f"{answer.prompt!r} -> {answer.text[:60]!r}: {ended}, {answer.tokens} tokens"
            lines.append(("answer", text))
    if not lines:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table, soft_wrap=False)
    console.print()

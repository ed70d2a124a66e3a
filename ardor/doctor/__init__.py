"""What is wrong with a checkpoint, its data or its run, how it shows, and what to do about it."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ardor.data.readers import Row
from ardor.data.sources import Rows, read_rows
from ardor.doctor.checkpoint import Checkpoint, Training, find_checkpoint, reading_of
from ardor.doctor.data import ROWS, Sample, sample
from ardor.doctor.facts import facts_of
from ardor.doctor.finding import Finding, Level
from ardor.doctor.probe import SMALL, Probe, cost, observe
from ardor.doctor.repair import repair
from ardor.doctor.rules import RULES
from ardor.doctor.runs import is_run, open_run
from ardor.doctor.tensors import measure
from ardor.errors import CheckpointError, ConfigError
from ardor.load import default_device

__all__ = ["Report", "Training", "doctor"]

Progress = Callable[[int, int], None]  # called with the bytes that are read, and all there are


@dataclass(frozen=True)
class Report:
    """What was found, the worst first, and how much was looked at."""

    path: Path
    findings: tuple[Finding, ...]
    rules: tuple[str, ...]  # that were run
    facts: tuple[tuple[str, str], ...]  # (what, how it is), for people: nothing is wrong with them
    data: Sample | None
    probe: Probe | None
    probe_note: str  # what a probe takes, and why there was none
    repaired: "Repaired | None"
    tensors: int  # whose values were read
    bytes: int
    seconds: float

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    @property
    def worst(self) -> Level | None:
        """None if nothing was found."""
        return self.findings[0].level if self.findings else None

    @property
    def exit_code(self) -> int:
        """0 for a clean one, 1 for warnings, 2 for errors; of the copy, where one was repaired."""
        if self.repaired is not None:
            return self.repaired.report.exit_code
        return 2 if self.count("E") else 1 if self.count("W") else 0


@dataclass(frozen=True)
class Repaired:
    """A copy in which some findings are repaired."""

    path: Path
    rules: tuple[str, ...]  # whose findings had a repair
    report: Report  # on the copy


def doctor(
    name: str | Path,
    *,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    run: str | Path | None = None,
    weights: bool = True,
    probe: bool | None = None,
    rows: int = ROWS,
    max_length: int | None = None,
    fix: str | Path | None = None,
    revision: str | None = None,
    use_safetensors: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Look at a checkpoint directory, hub id, adapter, or the newest checkpoint of a run.

    The weights are read one tensor at a time, unless `weights` is False. Of `data` the first `rows`
    are looked at, and examples that are longer than `max_length` (default: the model's positions)
    are counted; `eval_data` is what must not be among them. `run` is the folder of a run (default:
    `name`, if it is one). `probe` loads the model and lets it answer (None: if its weights are
    small, and nothing found before would keep it from loading). `fix` is a new directory for a copy
    in which the findings that have a mechanical repair are repaired.

    Raises: CheckpointError if there is no such directory or hub model; DataError if there is no
    such data; ConfigError for a run that is no folder, or a `fix` that holds something.
    """
    began = time.monotonic()
    found = find_checkpoint(name, revision, use_safetensors=use_safetensors)
    found.trusted, folder = trust_remote_code, _run_folder(name, run)
    found.run = None if folder is None else open_run(folder)
    if data is not None:
        heldout = () if eval_data is None else read_rows(eval_data)
        _look_at_rows(found, read_rows(data), heldout, most=rows, limit=max_length)
    size = _read(found, progress) if weights else 0
    findings = _findings(found, RULES)
    wanted, note = _wants_probe(found, findings, asked=probe, weights=weights)
    if wanted:
        found.probe = _probed(found)
        findings = _findings(found, RULES)
    repaired = None
    if fix is not None:
        done = repair(found, {finding.rule for finding in findings}, Path(fix))
        same = {"data": data, "rows": rows, "max_length": max_length}
        repaired = Repaired(Path(fix), done, doctor(fix, weights=weights, probe=probe, **same))
    return Report(
        path=found.path,
        findings=tuple(findings),
        rules=tuple(RULES),
        facts=facts_of(found),
        data=found.data,
        probe=found.probe,
        probe_note=note,
        repaired=repaired,
        tensors=len(found.statistics),
        bytes=size,
        seconds=time.monotonic() - began,
    )


def _run_folder(name: str | Path, run: str | Path | None) -> Path | None:
    if run is None:
        path = Path(name).expanduser()
        path = path.parent if path.name.startswith("checkpoint-") else path
        return path if is_run(path) else None
    if not Path(run).is_dir():
        raise ConfigError(f"{run} is no folder; give the folder of a run (runs/finetune-1)")
    return Path(run)


def _look_at_rows(
    found: Checkpoint, rows: Iterable[Row], heldout: Iterable[Row], *, most: int, limit: int | None
) -> None:
    """Encode rows for the model. A source that is not there raises; a row that is wrong does not.

    Raises: DataError; ConfigError if there is no tokenizer to encode with.
    """
    rows = iter(rows)
    first = next(rows, None)  # a source that is not there raises here
    if found.tokenizer is None:
        files = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        reason = found.problems.get("tokenizer", f"{found.path} has no {files}")
        raise ConfigError(f"data is looked at as the model's tokenizer encodes it: {reason}")
    kept = chain([] if first is None else [first], rows)
    found.data = sample(kept, reading_of(found, limit), most=most, heldout=heldout)


def _findings(found: Checkpoint, names: Iterable[str]) -> list[Finding]:
    """The worst first; of equals in the order of the rules."""
    findings = [replace(one, rule=name) for name in names for one in RULES[name](found)]
    return sorted(findings, key=lambda finding: "EWI".index(finding.level))


def _wants_probe(
    found: Checkpoint, findings: Sequence[Finding], *, asked: bool | None, weights: bool
) -> tuple[bool, str]:
    """Whether to run the model, and what to say of it."""
    size = _weight_bytes(found)
    if found.files is None or asked is False or (asked is None and not weights):
        return False, "not run"
    if asked is None and found.adapter and found.base is None:
        return False, "not run, as the adapter's base is not here"
    note = f"a probe {cost(size)}"
    if asked:
        return True, note
    if any(finding.level == "E" for finding in findings):
        return False, f"not run, as there are errors (--probe: it {cost(size)})"
    if size > SMALL:
        return False, f"not run by itself for a model of this size (--probe: it {cost(size)})"
    return True, note


def _weight_bytes(found: Checkpoint) -> int:
    parts = [found, found.base] if found.base is not None else [found]
    held = [part.files for part in parts if part.files is not None]
    try:
        return sum(files.size(name) for files in held for name in files.names())
    except CheckpointError:  # a dtype that nobody reads: it cannot be loaded anyway
        return SMALL + 1


def _probed(found: Checkpoint) -> Probe:
    size, trusted = _weight_bytes(found), found.trusted
    return observe(found.path, size, default_device(), trust_remote_code=trusted)


def _read(found: Checkpoint, progress: Progress | None) -> int:
    """Measure every tensor; the bytes that were read."""
    if found.files is None:
        return 0
    files, read, held = found.files, 0, []
    try:
        sizes = {name: files.size(name) for name in files.names()}
        for name, size in sizes.items():
            held.append(measure(files, name))
            read += size
            if progress:
                progress(read, sum(sizes.values()))
    except CheckpointError as error:
        found.problems["weights"] = str(error)
    found.statistics = tuple(one for one in held if one is not None)
    return read

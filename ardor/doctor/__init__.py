"""What is wrong with a checkpoint, how it shows, and what to do about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ardor.doctor.checkpoint import Checkpoint, compare, open_checkpoint
from ardor.doctor.finding import Finding, Level
from ardor.doctor.rules import RULES
from ardor.doctor.tensors import measure
from ardor.errors import CheckpointError
from ardor.files.hub import PATTERNS, PICKLE_PATTERNS, resolve
from ardor.files.runs import chosen_checkpoint
from ardor.load import CONFIG

Progress = Callable[[int, int], None]  # called with the bytes that are read, and all there are


@dataclass(frozen=True)
class Report:
    """What was found, the worst first, and how much was looked at."""

    path: Path
    findings: tuple[Finding, ...]
    rules: tuple[str, ...]  # that were run
    tensors: int  # whose values were read
    bytes: int
    seconds: float

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    @property
    def worst(self) -> Level | None:
        """None if nothing was found."""
        return self.findings[0].level if self.findings else None


def doctor(
    name: str | Path,
    *,
    weights: bool = True,
    revision: str | None = None,
    use_safetensors: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Look at a checkpoint directory, hub id, adapter, or the newest checkpoint of a run.

    The weights are read one tensor at a time, unless `weights` is False; no model is built.

    Raises: CheckpointError if there is no such directory or hub model.
    """
    began = time.monotonic()
    patterns = PATTERNS if use_safetensors else PICKLE_PATTERNS
    path = resolve(name, revision, patterns=patterns).path
    if not (path / CONFIG).exists():
        path = chosen_checkpoint(path) or path
    found = open_checkpoint(path, use_safetensors=use_safetensors)
    compare(found)
    size = _read(found, progress) if weights else 0
    findings = [
        replace(finding, rule=name) for name, rule in RULES.items() for finding in rule(found)
    ]
    findings.sort(key=lambda finding: "EWI".index(finding.level))
    return Report(
        path=path,
        findings=tuple(findings),
        rules=tuple(RULES),
        tensors=len(found.statistics),
        bytes=size,
        seconds=time.monotonic() - began,
    )


def _read(found: Checkpoint, progress: Progress | None) -> int:
    """Measure every tensor; the bytes that were read."""
    if found.files is None:
        return 0
    files, read, held = found.files, 0, []
    sizes = {name: files.size(name) for name in files.names()}
    for name, size in sizes.items():
        try:
            held.append(measure(files, name))
        except CheckpointError as error:
            found.problems["weights"] = str(error)
            break
        read += size
        if progress:
            progress(read, sum(sizes.values()))
    found.statistics = tuple(one for one in held if one is not None)
    return read

"""`ardor merge RUN -o DIR`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ardor.cli.console import print_json, program, remarks, results
from ardor.errors import ConfigError

if TYPE_CHECKING:
    from ardor.merge import MergeReport

SHOWN = 8  # of the maps that lose most


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fold a run's adapter into its base and write a plain checkpoint; says what is lost."""

    model: str
    """Folder of a LoRA or QLoRA run, an adapter's directory, or a model with --adapter."""
    output: Path | None = None
    """Directory to write."""
    onto: Literal["16bit", "dequantized", "requantized"] | None = None
    """What the adapter is added to: the full 16-bit weights; what the 4- or 8-bit base of the
    training stands for, in 16 bits; or that, packed again, which erases most of a small adapter.
    Default: 16bit, or dequantized where there are no full weights or the adapter began with
    loftq."""
    adapter: Path | None = None
    """An adapter to put on MODEL first."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    if config.output is None:
        raise ConfigError("missing OUTPUT; give the directory to write with -o")
    from ardor.load import default_device  # later: help needs no torch
    from ardor.merge import merge

    report = merge(
        config.model,
        config.output,
        onto=config.onto,
        adapter=config.adapter,
        revision=config.revision,
        device=str(default_device()),
    )
    if config.json:
        print_json(asdict(report) | {"logits": report.logits._asdict()})
        return 0
    _show(report)
    remarks().print(f"try it: {program()} generate {config.output} 'Once upon a time'")
    return 0


def _show(report: "MergeReport") -> None:
    from rich.table import Table

    out = results()
    count = len(report.residuals)
    table = Table("map", "change", "rounding", "base", "requantized", title=f"of {count} maps")
    worst = sorted(report.residuals, key=lambda one: -(one.rounding + (one.base or 0)))
    for one in worst[:SHOWN]:
        numbers = (one.change, one.rounding, one.base, one.requantized)
        table.add_row(one.name, *("-" if n is None else f"{n:.4f}" for n in numbers))
    if count:
        out.print(table)
    trained = f", trained on {report.trained_on}" if report.trained_on else ""
    out.print(f"merged onto   {report.onto} ({report.why}){trained}")
    for kind, words in (
        ("rounding", "lost to rounding the sum"),
        ("base", "the full weights differ from the base that was trained on by"),
        ("requantized", "packing the sum again loses, or would lose"),
    ):
        mean = report.mean(kind)
        if mean is not None:
            out.print(f"{kind:<13} {words}: {100 * mean:.2f} % of the adapter's change")
    check = report.logits
    out.print(
        f"logit check   largest difference {check.largest:.4g}, {check.nats:.3g} nats a token, "
        f"same choice at {100 * check.same_choice:.1f} % of positions"
    )

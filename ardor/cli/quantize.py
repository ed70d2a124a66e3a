"""`ardor quantize MODEL -o DIR`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ardor.cli.console import Progress, print_json, remarks, results
from ardor.errors import ConfigError

if TYPE_CHECKING:
    from ardor.quantize import Report

SHOWN = 10  # of the worst maps


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a checkpoint in 4 or 8 bits, one tensor at a time, with the error of each map."""

    model: str
    """Hub id, local directory, or the folder of a run."""
    output: Path | None = None
    """Directory to write."""
    format: str = "nf4"
    """nf4, nf4-dq, fp4, fp4-dq or int8 (LLM.int8), which transformers loads with bitsandbytes; or
    Ardor's own int8-g128, int4-g128 (and -g64, -g32). See docs/QUANTIZATION.md."""
    skip_modules: tuple[str, ...] = ()
    """Maps that stay as they are, by whole parts of their names; adds to the head and routers."""
    data: Path | None = None
    """A text file: its perplexity before and after."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    from ardor.files.json import read_text  # later: help needs no torch
    from ardor.quant.config import Quantization
    from ardor.quant.formats import format_name
    from ardor.quantize import quantize

    if config.output is None:
        raise ConfigError("missing OUTPUT; give the directory to write with -o")
    text = None if config.data is None else read_text(config.data)
    quantization = Quantization(format_name(config.format), skip=config.skip_modules)
    progress: list[Progress] = []

    def tell(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress("quantizing", total).__enter__())
        progress[0].update(done)

    try:
        report = quantize(
            config.model,
            config.output,
            quantization,
            text=text,
            revision=config.revision,
            tell=tell,
        )
    finally:
        for bar in progress:
            bar.__exit__(None, None, None)
    if config.json:
        worst = [one.name for one in report.worst[:SHOWN]]
        print_json(asdict(report) | {"relative": report.relative, "worst": worst})
        return 0
    _show(report)
    remarks().print(f"try it: ardor generate {config.output} 'Once upon a time'")
    return 0


def _show(report: "Report") -> None:
    from rich.table import Table

    out = results()
    table = Table("map", "relative error", "bits per weight", title=f"worst of {len(report.maps)}")
    for one in report.worst[:SHOWN]:
        table.add_row(one.name, f"{one.relative:.4f}", f"{one.bits_per_weight:.3f}")
    out.print(table)
    before, after = (size / 2**20 for size in (report.bytes_before, report.bytes_after))
    out.print(f"format          {report.format}")
    out.print(f"relative error  {report.relative:.4f} (mean of {len(report.maps)} maps)")
    out.print(f"size            {before:,.1f} MiB -> {after:,.1f} MiB")
    if report.perplexity_before is not None and report.perplexity_after is not None:
        pair = f"{report.perplexity_before:,.3f} -> {report.perplexity_after:,.3f}"
        out.print(f"perplexity      {pair}")
    if report.kept:
        shown = ", ".join(report.kept[:4]) + (", ..." if len(report.kept) > 4 else "")
        out.print(f"kept            {len(report.kept)} maps: {shown}")

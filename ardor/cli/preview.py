"""`ardor preview MODEL DATA`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ardor.cli.console import print_json, remarks, results
from ardor.train.shown import Settings

if TYPE_CHECKING:
    from rich.text import Text

    from ardor.data.shown import Document
    from ardor.preview import Preview

TRAINED, CONTROL, STOP, FAINT = "green", "cyan", "bold reverse green", "dim"
OPEN, CLOSE, END, REAL = "⟦", "⟧", "■", "◇"  # where there is no colour


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """See the rows as a model will be trained on them: which tokens, which targets, which ends."""

    model: str
    """Hub id, local directory, or the folder of a run; its weights are not read."""
    data: str
    """jsonl, json, csv, parquet, text files, a folder, or a hub dataset id; format recognised."""
    rows: int = 5
    """How many examples to show."""
    output: Path | None = None
    """Write them to this HTML page, which needs nothing else, instead of the terminal."""
    json: bool = False
    """Print one JSON document."""


def run(config: Config) -> int:
    from ardor.cli.config import narrowed  # later: help needs no torch
    from ardor.preview import preview

    found = preview(config.model, config.data, config.rows, narrowed(config, Settings))
    if config.output is not None:
        from ardor.preview.page import write_page

        write_page(found, config.output)
        remarks().print(f"wrote {config.output}")
    if config.json:
        print_json(asdict(found))
    elif config.output is None:
        _show(found)
    return 0


def _show(found: "Preview") -> None:
    from rich.text import Text

    console = results()
    plain = console.no_color or not console.is_terminal
    shown = sum(len(batch.documents) for batch in found.batches)
    console.print(f"{found.model}: {shown:,} of {found.examples:,} examples of {found.data}")
    if found.template is not None:
        console.print(f"chat template: {found.template}")
    ends = ", ".join(f"{token} ({id})" for id, token, _ in found.stops)
    console.print(f"stop tokens: {ends or 'none'}")
    for note in found.notes:
        console.print(note)
    console.print(_legend(plain))
    for batch in found.batches:
        of = (
            f"{len(batch.documents)} of {batch.of}" if len(batch.documents) < batch.of else batch.of
        )
        title = f"micro-batch {batch.number} of {found.micro_batches:,}"
        console.print()
        console.print(Text(f"━━ {title}: {of} documents, {batch.tokens:,} tokens", style="bold"))
        for row in batch.documents:
            console.print()
            console.print(Text(heading(row), style="" if plain else FAINT))
            console.print(_text(row, plain))
    console.print()
    for name, value in found.census.table():
        console.print(f"{name:22} {value}")
    if found.left_out:
        console.print(f"no example came of: {', '.join(found.left_out)}")


def heading(row: "Document") -> str:
    """Where a document comes from, how much of it is trained on, and where."""
    part = f", {row.part}" if row.part else ""
    spans = ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in row.trained)
    end = "" if row.ends else "; NO STOP TOKEN IS TRAINED ON"
    return (
        f"── {row.where}{part}: {row.tokens:,} tokens at positions 0–{row.tokens - 1}, "
        f"{row.targets:,} targets ({spans}){end}"
    )


def _legend(plain: bool) -> "Text":
    from rich.text import Text

    if plain:
        said = f"{OPEN}trained on{CLOSE}  {REAL}control token  {REAL}stop token{END}"
        return Text(f"{said}  ↵ line end  · space  ⇥ tab")
    return Text.assemble(
        ("trained on", TRAINED), "  ", ("stop token", STOP), "  ", ("control token", CONTROL),
        ("  ↵ line end  · space  ⇥ tab", FAINT),
    )  # fmt: skip


def _text(row: "Document", plain: bool) -> "Text":
    from rich.text import Text

    made, on = Text(), False
    for cell, text in row.shown:
        if plain and cell.trained != on:
            made.append(OPEN if cell.trained else CLOSE)
        on = cell.trained
        style = TRAINED if on else CONTROL if cell.kind == "control" else ""
        style = STOP if on and cell.stop else style
        if plain and cell.kind == "control":
            made.append(REAL)
        made.append(text, style="" if plain else style)
        if plain and cell.stop and on:
            made.append(END)
    if plain and on:
        made.append(CLOSE)
    return made

"""The preview as one HTML page that needs nothing else."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from ardor.data.shown_page import LEGEND, STYLE, article
from ardor.data.visible import visible
from ardor.files.atomic import write_atomic
from ardor.files.page import page, table, tiles
from ardor.preview import Packed, Preview


def write_page(found: Preview, path: Path) -> None:
    """Raises: CheckpointError if the page cannot be written."""
    write_atomic(path, render(found))


def render(found: Preview) -> str:
    """The page; every text in it is escaped."""
    shown = sum(len(batch.documents) for batch in found.batches)
    title = f"{shown:,} of {found.examples:,} examples"
    template = "" if found.template is None else f" · template <b>{escape(found.template)}</b>"
    stops = "".join(
        f'<li><code class="k">{escape(visible(token))}</code> {id}, from {escape(_and(names))}</li>'
        for id, token, names in found.stops
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(found.data)} for {escape(found.model)}{template}</p>',
        _tiles(found),
        LEGEND,
        *map(_batch, found.batches),
        f"<h2>Stop tokens</h2><ul>{stops or '<li>none</li>'}</ul>",
        *(f"<p>{escape(note)}</p>" for note in found.notes),
        "<h2>All of the data</h2>",
        table(found.census.table()),
        _left_out(found.left_out),
    ]
    return page(title, body, STYLE)


def _and(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _tiles(found: Preview) -> str:
    census = found.census
    share = census.targets / census.tokens if census.tokens else 0.0
    facts = [
        ("examples", f"{found.examples:,}"),
        ("tokens", f"{census.tokens:,}"),
        (f"targets, {share:.0%} of tokens", f"{census.targets:,}"),
        (f"longest, of at most {found.limit:,}", f"{census.longest:,}"),
        ("prompts truncated", f"{census.truncated:,}"),
        ("dropped, too long", f"{census.dropped:,}"),
    ]
    return tiles(facts)


def _batch(batch: Packed) -> str:
    part = f"{len(batch.documents)} of " if len(batch.documents) < batch.of else ""
    return (
        f"<section><h2>Micro-batch {batch.number}</h2>"
        f'<p class="soft">{part}{batch.of} documents, {batch.tokens:,} tokens end to end. '
        "Positions begin anew in each document, and none sees another.</p>"
        f"{''.join(map(article, batch.documents))}</section>"
    )


def _left_out(where: tuple[str, ...]) -> str:
    if not where:
        return ""
    return f'<p class="soft">No example came of {escape(", ".join(where))}.</p>'

"""The preview as one HTML page that needs nothing else."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from ardor.files.atomic import write_atomic
from ardor.preview import Cell, Document, Packed, Preview
from ardor.preview.visible import visible


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
        _table(found.census.table()),
        _left_out(found.left_out),
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body)))


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
    tiles = "".join(f"<div><b>{escape(v)}</b>{escape(k)}</div>" for k, v in facts)
    return f'<div class="tiles">{tiles}</div>'


def _batch(batch: Packed) -> str:
    part = f"{len(batch.documents)} of " if len(batch.documents) < batch.of else ""
    return (
        f"<section><h2>Micro-batch {batch.number}</h2>"
        f'<p class="soft">{part}{batch.of} documents, {batch.tokens:,} tokens end to end. '
        "Positions begin anew in each document, and none sees another.</p>"
        f"{''.join(map(_document, batch.documents))}</section>"
    )


def _document(row: Document) -> str:
    part = f", example {row.part}" if row.part else ""
    spans = ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in row.trained)
    warning = "" if row.ends else '<p class="bad">No stop token is trained on.</p>'
    return (
        f"<article><header><b>{escape(row.where)}{part}</b><span>{row.tokens:,} tokens, "
        f"{row.targets:,} targets at {spans}</span></header>{warning}"
        f"<pre>{''.join(_cell(*pair) for pair in row.shown)}</pre></article>"
    )


def _cell(cell: Cell, text: str) -> str:
    classes = ["t"] + ["on"] * cell.trained + ["k"] * (cell.kind == "control")
    classes += ["end"] * (cell.stop and cell.trained)
    ids = " ".join(map(str, cell.ids))
    said = "trained on" if cell.trained else "given"
    if cell.stop:
        said += ", a stop token"
    return (
        f'<span class="{" ".join(classes)}" data-id="{ids}" '
        f'title="id {ids} at position {cell.position}: {said}">{escape(text)}</span>'
    )


def _table(lines: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(k.strip())}</th><td>{escape(v)}</td></tr>" for k, v in lines)
    return f"<table>{rows}</table>"


def _left_out(where: tuple[str, ...]) -> str:
    if not where:
        return ""
    return f'<p class="soft">No example came of {escape(", ".join(where))}.</p>'


LEGEND = """<div class="legend"><span class="t on">trained on</span><span class="t">given</span>
<span class="t k">control token</span><span class="t on k end">stop token, trained on</span>
<span class="soft">↵ line end · ⇥ tab · a middle dot is a space at an edge</span>
<label><input type="checkbox" id="borders"> borders of tokens</label>
<label><input type="checkbox" id="ids"> ids</label></div>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #656d76; --line: #e3e6ea; --card: #fff;
  --page: #f6f7f9; --on: #cdeed6; --on-ink: #0b4a22; --end: #157a3c; --key: #2764c4;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a1ab; --line: #30363d;
  --card: #1a1f25; --page: #12161a; --on: #173d26; --on-ink: #b5ecc6; --end: #46b36c;
  --key: #6ea2f2; --bad: #f2837c; } }
* { box-sizing: border-box; }
body { max-width: 1000px; margin: 0 auto; padding: 24px 16px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 24px; }
h2 { margin: 32px 0 4px; font-size: 18px; }
p { margin: 0 0 12px; }
.soft { color: var(--soft); font-size: 14px; }
.bad { margin: 0; padding: 6px 14px; color: var(--bad); font-weight: 600; }
.tiles { display: grid; gap: 8px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.tiles div, article, table { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles div { padding: 8px 12px; color: var(--soft); font-size: 13px; }
.tiles b { display: block; color: var(--ink); font-size: 20px; font-weight: 600; }
.legend { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 8px 0;
  background: var(--page); font-size: 13px; align-items: center; z-index: 1; }
@media (max-width: 600px) { .legend { position: static; } }
article { margin: 0 0 12px; overflow: hidden; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px;
  padding: 8px 14px; border-bottom: 1px solid var(--line); font-size: 13px; }
header span { color: var(--soft); font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, monospace; }
.t { padding: 1px 0; border-radius: 2px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.on { background: var(--on); color: var(--on-ink); }
.k { color: var(--key); }
.on.k { color: var(--end); font-weight: 600; }
.on.end { background: var(--end); color: var(--card); }
.legend .t { padding: 1px 6px; border: 1px solid var(--line); font: 13px ui-monospace, monospace; }
.t:hover { outline: 2px solid var(--key); }
body:has(#borders:checked) pre .t { box-shadow: inset 1px 0 var(--soft); }
body:has(#ids:checked) pre .t::before { content: attr(data-id); margin: 0 2px; color: var(--soft);
  font-size: 9px; font-weight: 400; vertical-align: super; }
body:has(#ids:checked) pre .end::before { color: inherit; }
table { width: 100%; border-spacing: 0; font-size: 14px; }
th, td { padding: 5px 14px; text-align: left; border-bottom: 1px solid var(--line); }
tr:last-child th, tr:last-child td { border-bottom: 0; }
th { width: 45%; font-weight: 400; color: var(--soft); }
"""

"""Documents of `ardor.data.shown` in HTML: each token with its id, and coloured if trained on."""

from html import escape

from ardor.data.shown import Cell, Document

SPANS = 12  # runs of targets that are named


def article(row: Document) -> str:
    """One document; every text in it is escaped."""
    part = f", {row.part}" if row.part else ""
    spans = ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in row.trained[:SPANS])
    spans += ", …" if len(row.trained) > SPANS else ""
    warning = "" if row.ends else '<p class="bad">No stop token is trained on.</p>'
    return (
        f"<article><header><b>{escape(row.where + part)}</b><span>{row.tokens:,} tokens, "
        f"{row.targets:,} targets at {spans}</span></header>{warning}"
        f"<pre>{''.join(_cell(*pair) for pair in row.shown)}</pre></article>"
    )


def _cell(cell: Cell, text: str) -> str:
    if cell.kind == "gap":
        return f'<span class="gap">{escape(cell.text)}</span>'
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


LEGEND = """<div class="signs"><span class="t on">trained on</span><span class="t">given</span>
<span class="t k">control token</span><span class="t on k end">stop token, trained on</span>
<span class="soft">↵ line end · ⇥ tab · a middle dot is a space at an edge</span>
<label><input type="checkbox" id="borders"> borders of tokens</label>
<label><input type="checkbox" id="ids"> ids</label></div>"""

STYLE = """
:root { --on: #cdeed6; --on-ink: #0b4a22; --end: #157a3c; }
@media (prefers-color-scheme: dark) { :root { --on: #173d26; --on-ink: #b5ecc6; --end: #46b36c; } }
.signs { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 8px 0;
  background: var(--page); font-size: 13px; align-items: center; z-index: 1; }
@media (max-width: 600px) { .signs { position: static; } }
article { margin: 0 0 12px; overflow: hidden; background: var(--card); border-radius: 8px;
  border: 1px solid var(--line); }
header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px;
  padding: 8px 14px; border-bottom: 1px solid var(--line); font-size: 13px; }
header span { color: var(--soft); font-variant-numeric: tabular-nums; }
article .bad { margin: 0; padding: 6px 14px; font-weight: 600; }
pre { margin: 0; padding: 12px 14px; white-space: pre-wrap;
  font: 13px/1.7 ui-monospace, monospace; }
.t { padding: 1px 0; border-radius: 2px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.on { background: var(--on); color: var(--on-ink); }
.k { color: var(--train); }
.on.k { color: var(--end); font-weight: 600; }
.on.end { background: var(--end); color: var(--card); }
.gap { display: block; margin: 6px 0; color: var(--soft); text-align: center; }
.signs .t { padding: 1px 6px; border: 1px solid var(--line); font: 13px ui-monospace, monospace; }
.t:hover { outline: 2px solid var(--train); }
body:has(#borders:checked) pre .t { box-shadow: inset 1px 0 var(--soft); }
body:has(#ids:checked) pre .t::before { content: attr(data-id); margin: 0 2px; color: var(--soft);
  font-size: 9px; font-weight: 400; vertical-align: super; }
body:has(#ids:checked) pre .end::before { color: inherit; }
"""

"""An HTML page that needs nothing else: what all of ours share of looks, tiles and tables."""

from collections.abc import Iterable
from html import escape

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


def page(title: str, parts: Iterable[str], style: str) -> str:
    """The page of parts that are HTML already; empty ones are left out."""
    body = "\n".join(filter(None, parts))
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """(label, value) pairs, the value large."""
    made = "".join(f"<div><b>{escape(v)}</b>{escape(k)}</div>" for k, v in facts)
    return f'<div class="tiles">{made}</div>'


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns of texts. A name is broken between its words before it is within one."""
    made = "".join(
        f"<tr><th>{escape(k.strip()).replace('_', '_<wbr/>')}</th><td>{escape(v)}</td></tr>"
        for k, v in rows
    )
    return f"<table>{made}</table>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #656d76; --line: #e3e6ea; --card: #fff;
  --page: #f6f7f9; --train: #2764c4; --eval: #d2691e; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a1ab; --line: #30363d;
  --card: #1a1f25; --page: #12161a; --train: #6ea2f2; --eval: #f09a5b; --bad: #f2837c; } }
* { box-sizing: border-box; }
body { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 8px; font-size: 24px; }
h2 { margin: 32px 0 8px; font-size: 18px; }
p { margin: 0 0 12px; }
.soft { color: var(--soft); font-size: 14px; }
.bad { color: var(--bad); }
.tiles { display: grid; gap: 8px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.tiles div, table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles div { padding: 8px 12px; color: var(--soft); font-size: 13px; }
.tiles b { display: block; color: var(--ink); font-size: 20px; font-weight: 600; }
table { width: 100%; border-spacing: 0; font-size: 14px; }
th, td { padding: 5px 14px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tr:last-child th, tr:last-child td { border-bottom: 0; }
th { width: 38%; font-weight: 400; color: var(--soft); }
"""

"""Building blocks of HTML pages: each page is one file that needs no server or network."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from t2i.charts import Chart, reading, svg
from t2i.errors import UserError

_ASSETS = Path(__file__).parent / "assets" / "pages"
_ICON = '<link rel="icon" href="data:,">'


def html_page(title: str, body: str, *, name: str, styles: str = "") -> str:
    """A page with the common style and assets/pages/NAME.css, and NAME.js at its end.

    Args:
        title: plain text.
        body: HTML.
        styles: further rules.
    """
    base, style, script = (_read(file) for file in ("base.css", f"{name}.css", f"{name}.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
{_ICON}
<style>
{base}{style}{styles}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""


def refuse_other_page(path: Path, mark: str) -> None:
    """UserError if a file where a page is to be written is not a page of `html_page`, or is another
    program's: that of a training run, for one, which nothing would write again.

    mark: text that only this program's pages hold.
    """
    if path.is_file() and path.with_name("metrics.jsonl").exists():
        raise UserError(f"{path} is the page of a training run: give another folder with --out")
    marks = (f"</title>\n{_ICON}\n<style>", mark)
    if path.is_file() and not all(text.encode() in path.read_bytes() for text in marks):
        raise UserError(
            f"{path} would be overwritten, and is not a page of this program; move it, or give "
            "another folder with --out"
        )


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def embedded_json(name: str, content: object) -> str:
    """JSON for a page, in an element whose id is `name`: the page's script reads it there."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script id="{name}" type="application/json">{data}</script>'


# -- made interactive by report.js -----------------------------------------------------------------
def chart_html(chart: Chart) -> str:
    """A chart that shows its numbers under the pointer, or with the arrow keys."""
    data = html.escape(json.dumps(reading(chart), separators=(",", ":")))
    return f'<figure class="chart" tabindex="0" data-reading="{data}">{svg(chart)}<output></output></figure>'


def frames_html(frames: Sequence[tuple[str, str]], about: str) -> str:
    """Images shown in one place, with a slider to move through them; begins with the last.

    Args:
        frames: file (relative to the page) and label of each.
        about: what the slider selects, such as "step".
    """
    shown = [(quote(file), label) for file, label in frames]
    data, (last, label) = html.escape(json.dumps(shown)), shown[-1]
    slider = f'<input type="range" min="0" max="{len(shown) - 1}" value="{len(shown) - 1}" aria-label="{html.escape(about)}">'
    return (
        f'<figure class="frames" data-frames="{data}"><div class="tools"><label>{html.escape(about)} '
        f'{slider}</label><output>{html.escape(label)}</output><button type="button" '
        f'title="play (space)">Play</button></div><img src="{last}" alt="{html.escape(label)}"></figure>'
    )


def facts_html(facts: Mapping[str, str]) -> str:
    """A row of key facts, each under its name."""
    cells = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    ]
    return f'<dl class="facts">{"".join(cells)}</dl>'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first cell of each row is its heading."""
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide"><table class="numbers"><tr>{titles}</tr>{"".join(lines)}</table></div>'
    )

"""The frame of the pages that people look at: one file that needs no server and no network."""

import html
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets" / "pages"


def html_page(title: str, body: str, *, name: str, styles: str = "") -> str:
    """A page with the common style, then assets/pages/NAME.css, and at its end NAME.js.

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
<link rel="icon" href="data:,">
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


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")

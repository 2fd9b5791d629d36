"""A static page of failures: every failed image, with what the judge saw and why it failed.

The page is a folder that can be moved, zipped or put on a web server: index.html (with styles and
script inline) and pictures/, copies of the images with at most `_SIDE` pixels a side, named by
their content. It needs no network, and JavaScript only for filtering and zooming.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from t2i.charts import TINTS
from t2i.evaluation.generation_folder import load_image
from t2i.evaluation.results import Score, by_way
from t2i.files import file_sha256, writable_folder, write_text
from t2i.imaging import save_image
from t2i.pages import html_page

_SIDE = 512
_OWN = re.compile(r"[0-9a-f]{16}\.(webp|png)")
"""Names of the pictures that a gallery writes; nothing else is removed."""
_PIXEL_ART = 160
"""Images of at most this many pixels a side are stored losslessly and shown with square pixels."""


@dataclass(frozen=True)
class Box:
    """A labeled rectangle in the image's pixels; `tint` indexes `TINTS`, modulo their number."""

    label: str
    corners: tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    tint: int = 0


@dataclass(frozen=True)
class Card:
    """What the page shows about one image."""

    section: str
    """The section it is shown in, such as the score it belongs to."""
    title: str
    reasons: Sequence[str]
    """The lines after a reason's first are shown as its details."""
    boxes: Sequence[Box] = ()
    note: str = ""
    """One line below the title."""
    tags: Sequence[str] = ()
    """The scores it counts against, by which the page is filtered; its section if empty."""

    @property
    def filters(self) -> Sequence[str]:
        return self.tags or (self.section,)


@dataclass(frozen=True)
class Exhibit:
    """A card and its image."""

    card: Card
    name: str
    image: Path
    sha256: str
    overlay: Path
    """A transparent picture to lay over the image; the file need not exist."""


def write_gallery(folder: Path, results: dict, exhibits: Sequence[Exhibit]) -> Path:
    """Write FOLDER/index.html and its pictures, and remove pictures of earlier runs that are no
    longer shown.

    Args:
        results: the content of results.json.
    """
    pictures = folder / "pictures"
    writable_folder(pictures)
    shown: set[Path] = set()
    sections: dict[str, list[str]] = {}
    for exhibit in exhibits:
        cards = sections.setdefault(exhibit.card.section, [])
        cards.append(_card_html(exhibit, pictures, shown))
    for path in set(pictures.iterdir()) - shown:
        if _OWN.fullmatch(path.name):
            path.unlink()
    found = Counter(name for exhibit in exhibits for name in exhibit.card.filters)
    names = dict.fromkeys([score["name"] for score in results["scores"].values()] + list(found))
    filters = {name: found[name] for name in names if name in found}  # in the scores' order
    body = [
        _header_html(results, len(exhibits)),
        _scores_html(results, filters),
        _toolbar_html(filters, exhibits) if exhibits else '<p class="empty">No image failed.</p>',
        *(_section_html(name, cards, results) for name, cards in sections.items()),
    ]
    tints = "".join(f".t{i} {{ --tint: {color}; }}\n" for i, color in enumerate(TINTS))
    body.append('<dialog id="zoom"></dialog>')
    title = f"{results['benchmark']}: failures"
    page = html_page(title, "".join(body), name="gallery", styles=tints)
    return write_text(folder / "index.html", page)


def _header_html(results: dict, failed: int) -> str:
    coverage, generation = results["coverage"], results["generation"]
    where = f"Images: {results['images']}."
    if generation is not None:
        settings = {"seed": generation["seed"], **generation["sampling"]}
        where = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items())
    each = results["samples_per_prompt"]
    complete = results["status"] == "complete"
    flag = "" if complete else f'<p class="flag">{html.escape(results["status"])}</p>'
    return f"""<header><h1>{html.escape(results["benchmark"])} <span>failures</span></h1>
<p>{html.escape(results["label"][:1].upper() + results["label"][1:])}</p>
<p><b>{failed}</b> of {coverage["judged"]} images failed: {coverage["prompts"]} prompts,
{each} image{"s" * (each != 1)} each.</p><p class="faint">{html.escape(where)}</p>{flag}</header>
"""


def _scores_html(results: dict, filters: dict[str, int]) -> str:
    """All scores as bars with their standard errors; two columns for each way of counting."""
    ways, by_name = by_way([Score(**score) for score in results["scores"].values()])
    rows = []
    if len(ways) > 1:
        cells = "".join(f'<th class="bar"></th><th>{_pretty(way)}</th>' for way in ways)
        rows.append(f"<tr><td></td>{cells}</tr>\n")
    for name, of_ways in by_name.items():
        label = _pretty(name)
        if name in filters:
            label = f'<a href="#{urlencode({"task": name})}">{label}</a>'
        kind = " class=part" if " -" in name else ""
        if any(score.headline for score in of_ways.values()):
            kind = " class=headline"
        cells = "".join(_score_html(of_ways.get(way), results) for way in ways)
        rows.append(f"<tr{kind}><th>{label}</th>{cells}</tr>\n")
    legend = f'<p class="faint">{html.escape(results["legend"])}</p>\n'
    return f'<table class="scores">{"".join(rows)}</table>\n{legend}'


def _score_html(score: Score | None, results: dict) -> str:
    if score is None or score.mean is None:
        return "<td></td><td>-</td>"
    best, digits = results["best_possible"], results["decimals"]
    mean, error = score.mean / best, (score.stderr or 0) / best
    low, high = max(0.0, mean - error), min(1.0, mean + error)
    spread = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
    return (
        f'<td class="bar"><div><i style="width:{mean:.2%}"></i>'
        f'<u style="left:{low:.2%};width:{high - low:.2%}"></u></div></td>'
        f"<td><b>{score.mean:.{digits}f}</b>{spread}</td>"
    )


def _toolbar_html(filters: dict[str, int], exhibits: Sequence[Exhibit]) -> str:
    shown = {
        "boxes": any(exhibit.card.boxes for exhibit in exhibits),
        "masks": any(exhibit.overlay.is_file() for exhibit in exhibits),
    }
    toggles = "".join(
        f'\n<label title="({name[0]})"><input id="{name}" type="checkbox" checked> {name}</label>'
        for name, there in shown.items()
        if there
    )
    counts = {"": len(exhibits), **filters}
    chips = "".join(
        f'<a class="chip" data-task="{html.escape(name)}" href="#{urlencode({"task": name})}">'
        f"{_pretty(name) or 'All'} <small>{count}</small></a>"
        for name, count in counts.items()
    )
    return f"""<nav><div class="chips">{chips}</div><div class="tools">
<input id="search" type="search" placeholder="prompt, reason or file (/)" aria-label="search">{toggles}</div></nav>
<p class="empty" id="nothing" hidden>Nothing matches.</p>
"""


def _section_html(name: str, cards: list[str], results: dict) -> str:
    score = results["scores"].get(name)
    of = f" of {score['images']}" if score else ""
    return (
        f"<section><h2>{_pretty(name)} "
        f'<small>{len(cards)}{of} failed<span class="shown"></span></small></h2><div class="cards">\n{"".join(cards)}</div></section>\n'
    )


def _card_html(exhibit: Exhibit, pictures: Path, shown: set[Path]) -> str:
    card = exhibit.card
    photo, size = _copy_image(exhibit, pictures)
    shown.add(photo)
    layers = [
        f'<img src="pictures/{photo.name}" alt="{html.escape(card.title)}" loading="lazy" '
        f'width="{size[0]}" height="{size[1]}">'
    ]
    if exhibit.overlay.is_file():
        overlay = _copy_overlay(exhibit.overlay, pictures)
        shown.add(overlay)
        layers.append(f'<img class="mask" src="pictures/{overlay.name}" alt="" loading="lazy">')
    layers += [_box_html(box, size) for box in card.boxes]
    pixels = " pixels" if max(size) <= _PIXEL_ART else ""
    reasons = "".join(map(_reason_html, card.reasons))
    note = f"<p>{html.escape(card.note)}</p>" if card.note else ""
    text = " ".join([card.title, card.note, *card.reasons, exhibit.name]).lower()
    filters = html.escape(json.dumps(list(card.filters)))
    return f"""<article data-text="{html.escape(text)}" data-tasks="{filters}" tabindex="0">
<div class="view{pixels}" style="aspect-ratio:{size[0]}/{size[1]}">{"".join(layers)}</div>
<h3>{html.escape(card.title)}</h3>{note}<ul>{reasons}</ul><code>{html.escape(exhibit.name)}</code></article>
"""


def _reason_html(reason: str) -> str:
    first, *details = map(html.escape, reason.split("\n"))
    return f"<li>{first}{''.join(f'<small>{line}</small>' for line in details)}</li>"


def _box_html(box: Box, size: tuple[int, int]) -> str:
    """A rectangle in percent of the image, with its label placed where there is room."""
    x0, y0, x1, y1 = (c / size[i % 2] for i, c in enumerate(box.corners))
    place = f"left:{x0:.2%};top:{y0:.2%};width:{x1 - x0:.2%};height:{y1 - y0:.2%}"
    sides = (" inside" if y0 < 0.1 else "") + (" right" if x0 > 0.55 else "")
    tint = f"t{box.tint % len(TINTS)}"
    return f'<i class="box {tint}{sides}" style="{place}"><b>{html.escape(box.label)}</b></i>'


def _copy_image(exhibit: Exhibit, pictures: Path) -> tuple[Path, tuple[int, int]]:
    """Copy an image; returns the copy and the original's size in pixels."""
    path = pictures / f"{exhibit.sha256[:16]}.webp"
    image = load_image(exhibit.image)
    size = image.size
    if not path.is_file():
        image.thumbnail((_SIDE, _SIDE))
        save_image(image, path, format="WEBP", lossless=max(size) <= _PIXEL_ART, quality=88)
    return path, size


def _copy_overlay(overlay: Path, pictures: Path) -> Path:
    path = pictures / f"{file_sha256(overlay)[:16]}.png"
    if not path.is_file():
        with Image.open(overlay) as image:
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.NEAREST)
            save_image(image, path, format="PNG")
    return path


def _pretty(name: str) -> str:
    return html.escape(name.replace("_", " ").capitalize())

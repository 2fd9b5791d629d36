"""Line charts, laid out once and drawn as SVG (for pages, files and papers) and as PNG."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from t2i.files import write_text
from t2i.imaging import save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINTS = ("#e5484d", "#3b82f6", "#22a06b", "#d97706", "#8b5cf6", "#0ea5b7", "#db2777", "#65748b")
"""Colors that can be told apart on white and on black, used cyclically."""
_WIDTH, _PLOT_HEIGHT = 440, 190
_LEFT, _RIGHT, _TOP, _BELOW = 54, 14, 48, 44
"""Margins around the plot."""
_FONT, _LETTER, _ROW = 13, 7.6, 18
"""Font size, approximate width of a letter, and height of a row of the legend."""
_PNG_SCALE = 2

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]
    """In order of x."""
    tint: int = 0
    """Index of its color in `TINTS`."""
    dashed: bool = False
    """Marks a baseline for comparison."""
    errors: tuple[float, ...] = ()
    """Standard error of each point."""
    dots: bool = False
    """Mark the points."""


@dataclass(frozen=True)
class Chart:
    """A line chart: its labels and lines."""

    title: str
    x_label: str
    y_label: str
    """Including the unit."""
    series: tuple[Series, ...]
    """At least one, none of them empty."""
    from_zero: bool = False
    """The vertical axis begins at 0."""


# -- layout ----------------------------------------------------------------------------------------
class _Frame:
    """Maps a chart's numbers to positions in the image."""

    def __init__(self, chart: Chart):
        xs = [x for series in chart.series for x, _ in series.points]
        ys = [
            bound
            for series in chart.series
            for (_, y), error in zip(series.points, _errors(series), strict=True)
            for bound in (y - error, y + error)
        ]
        self.x0, self.x1 = _widened(min(xs), max(xs), share=0)
        # Labels have room for five digits, in which closer levels would look the same.
        least = 5e-4 * max(map(abs, ys))
        middle, room = (min(ys) + max(ys)) / 2, least * (least > max(ys) - min(ys) > 0)
        self.y0, self.y1 = _widened(min(*ys, middle - room), max(*ys, middle + room), share=0.06)
        if chart.from_zero:
            self.y0 = min(0.0, min(ys))
        self.whole_x = all(float(x).is_integer() for x in xs)
        self.legend = list(_legend_places(chart.series))
        self.bottom = _TOP + _PLOT_HEIGHT
        self.height = self.bottom + _BELOW + _ROW * (1 + max(row for _, row in self.legend))

    def place(self, x: float, y: float) -> Point:
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * across, self.bottom - _PLOT_HEIGHT * up


def _errors(series: Series) -> tuple[float, ...]:
    return series.errors or (0.0,) * len(series.points)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a margin at both ends; never empty."""
    room = share * (high - low) or (0 if high > low else 0.5 * abs(low) or 0.5)
    return low - room, high + room


def _legend_places(series: Sequence[Series]) -> Iterator[tuple[float, int]]:
    """For each series, the x position and the row at which its entry begins."""
    x, row = float(_LEFT), 0
    for one in series:
        width = 24 + _LETTER * len(one.name)
        if x > _LEFT and x + width > _WIDTH - _RIGHT:
            x, row = _LEFT, row + 1
        yield x, row
        x += width + 14


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to six round numbers in a range; whole ones if asked for."""
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = next(unit * f for f in (1, 2, 5, 10) if span / (unit * f) <= 5)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# -- drawing ---------------------------------------------------------------------------------------
def _level(y: float) -> str:
    """A level's number in the six characters that fit left of the plot: 0.00015 is 1.5e-4."""
    if not 0 < abs(y) < 1e-3:
        return f"{y:g}"
    digits, exponent = f"{y:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _draw(chart: Chart, frame: _Frame, pen: "_SvgPen | _PngPen") -> None:
    pen.text((_LEFT, 17), chart.title, bold=True)
    pen.text((_LEFT, 36), chart.y_label)
    for y in ticks(frame.y0, frame.y1):
        left, right = frame.place(frame.x0, y), frame.place(frame.x1, y)
        pen.rule(left, right)
        pen.text((left[0] - 6, left[1] + 4), _level(y), "end")
    for x in ticks(frame.x0, frame.x1, whole=frame.whole_x):
        at, _ = frame.place(x, frame.y0)
        pen.rule((at, frame.bottom), (at, frame.bottom + 4))
        pen.text((at, frame.bottom + 18), f"{x:g}", "middle")
    pen.text((_WIDTH - _RIGHT, frame.bottom + 34), chart.x_label, "end")
    for series, (x, row) in zip(chart.series, frame.legend, strict=True):
        color = TINTS[series.tint % len(TINTS)]
        for (px, py), error in zip(series.points, _errors(series), strict=True):
            if error:
                pen.line([frame.place(px, py - error), frame.place(px, py + error)], color)
        places = [frame.place(*point) for point in series.points]
        pen.line(places, color, dashed=series.dashed)
        for place in places if series.dots else places[-1:]:
            pen.dot(place, color)
        baseline = frame.bottom + _BELOW + 6 + _ROW * row
        pen.line([(x, baseline - 4), (x + 18, baseline - 4)], color, dashed=series.dashed)
        pen.text((x + 24, baseline), series.name)


class _SvgPen:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def line(self, points: Sequence[Point], color: str, *, dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>')

    def rule(self, a: Point, b: Point) -> None:
        ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        self.parts.append(f'<line {ends} stroke="currentColor" stroke-opacity="0.18"/>')

    def dot(self, at: Point, color: str) -> None:
        self.parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="2.6" fill="{color}"/>')

    def text(self, at: Point, text: str, anchor: str = "start", *, bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}"{weight}'
        self.parts.append(f"<text {place}>{html.escape(text)}</text>")


class _PngPen:
    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)
        self.font = ImageFont.load_default(size=_FONT * _PNG_SCALE)

    def line(self, points: Sequence[Point], color: str, *, dashed: bool = False) -> None:
        scaled = [(_PNG_SCALE * x, _PNG_SCALE * y) for x, y in points]
        for piece in _dashes(scaled, 5.0 * _PNG_SCALE) if dashed else [scaled]:
            self.draw.line(piece, fill=color, width=3, joint="curve")

    def rule(self, a: Point, b: Point) -> None:
        ends = [(_PNG_SCALE * x, _PNG_SCALE * y) for x, y in (a, b)]
        self.draw.line(ends, fill="#d8d8d6", width=_PNG_SCALE)

    def dot(self, at: Point, color: str) -> None:
        self.draw.circle([_PNG_SCALE * v for v in at], 2.6 * _PNG_SCALE, fill=color)

    def text(self, at: Point, text: str, anchor: str = "start", *, bold: bool = False) -> None:
        place = (_PNG_SCALE * at[0], _PNG_SCALE * at[1])
        side = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        self.draw.text(
            place, text, fill="#1f2023", font=self.font, anchor=side, stroke_width=0.5 * bold
        )


def _dashes(points: Sequence[Point], length: float) -> Iterator[list[Point]]:
    """Every other piece of a line that is cut into pieces of this length."""
    done = 0.0
    for (ax, ay), (bx, by) in pairwise(points):
        whole = math.hypot(bx - ax, by - ay)
        at = 0.0
        while at < whole:
            end = min(whole, at + length - done % length)
            if int((done + 1e-6) // length) % 2 == 0:
                yield [(ax + (bx - ax) * t / whole, ay + (by - ay) * t / whole) for t in (at, end)]
            done, at = done + end - at, end


# -- output ----------------------------------------------------------------------------------------
def svg(chart: Chart, *, alone: bool = False) -> str:
    """The chart as an SVG element, in the color of the surrounding text; with `alone`, for a
    separate file, dark on white.
    """
    frame, pen = _Frame(chart), _SvgPen()
    _draw(chart, frame, pen)
    style = ' style="color:#1f2023;background:#fff"' if alone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {frame.height}" role="img" '
        f'aria-label="{html.escape(chart.title)}" font-family="system-ui, sans-serif" '
        f'font-size="{_FONT}" fill="currentColor" stroke-width="1.6"{style}>'
        f"{''.join(pen.parts)}</svg>"
    )


def reading(chart: Chart) -> dict:
    """The data with which a page shows the numbers under the pointer, JSON-compatible."""
    frame = _Frame(chart)
    return {
        "x": [frame.x0, frame.x1],
        "across": [_LEFT / _WIDTH, 1 - _RIGHT / _WIDTH],
        "down": [_TOP, frame.bottom],
        "label": chart.x_label,
        "series": [{"name": s.name, "points": s.points} for s in chart.series],
    }


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure as SVG: the same figure always gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def save_chart(chart: Chart, path: Path) -> list[Path]:
    """Write PATH.svg and PATH.png."""
    frame = _Frame(chart)
    size = (_PNG_SCALE * _WIDTH, round(_PNG_SCALE * frame.height))
    image = Image.new("RGB", size, "white")
    _draw(chart, frame, _PngPen(image))
    png = save_png(image, path.with_suffix(".png"))  # makes the folder
    return [write_text(path.with_suffix(".svg"), svg(chart, alone=True) + "\n"), png]

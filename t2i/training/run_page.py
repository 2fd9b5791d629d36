"""A run's page, RUN/index.html, which any browser shows offline: curves of all metrics logged by
the run (and by its control), sheets over time, settings.
"""

import html
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean

from t2i.charts import Chart, Point, Series
from t2i.errors import UserError
from t2i.fields import read_object
from t2i.files import write_text
from t2i.pages import chart_html, facts_html, frames_html, html_page
from t2i.progress import readable_time
from t2i.training.config import METRICS
from t2i.training.logs import read_metrics

log = logging.getLogger(__name__)

_NATS = "nats per code"
_LOSSES = (
    (r"train/(loss|slot0)", "Training loss", _NATS),
    (r"validation/\w+/slot0", "Held-out loss of final codes", _NATS),
    (r"train/slot\d+", "Training loss of drafts", _NATS),
    (r"validation/own_drafts/.*", "Held-out loss of drafts, the model's own as input", _NATS),
    (r"validation/noised_truth/.*", "Held-out loss of drafts, noised truth as input", _NATS),
)
"""Charts that come first on the page: pattern of the metrics' names, title, unit."""
_MACHINERY = (
    (r"train/grad_norm", "Norm of the gradient", "before it is clipped"),
    (r"lr/.*", "Learning rates", "of this step"),
    (r"images_per_s", "Speed", "images per second, since the start"),
    (r"seconds/.*", "Seconds of a step", "s"),
    (r"data_wait", "Waiting for data", "share of the steps' time"),
    (r"memory_gb", "Peak memory", "GB of the main process"),
)
"""Charts that come last on the page, with an axis from 0. All others come between."""
_MOST_POINTS = 400
"""A curve with more points is drawn as means of neighbors."""


def refresh_run_page(run_dir: str | Path) -> None:
    """Rewrite the page during a run. If that fails, warn: a page must not end the run."""
    try:
        write_run_page(run_dir)
    except (UserError, OSError) as error:
        log.warning("the run's page stays as it is: %s", error)


def write_run_page(run_dir: str | Path) -> Path:
    """Write (or rewrite) the page of a run."""
    run_dir = Path(run_dir)
    rows, config = read_metrics(run_dir), read_object(run_dir / "config.json")
    control = (config.get("log") or {}).get("control")
    title, beside, other = run_dir.resolve().name, "", list[dict]()
    if control is not None:
        there = (Path(control) / METRICS).is_file()
        other = read_metrics(control) if there else []
        state = "dashed" if other else "no metrics to read" if there else "not there yet"
        beside = f'<p class="faint">control ({state}): {html.escape(control)}</p>'
    charts = metric_charts(rows, other)
    drawn = "".join(map(chart_html, charts)) or '<p class="empty">Nothing is logged yet.</p>'
    parts = [
        f"<header><h1>{html.escape(title)}</h1>{beside}"
        f"{facts_html(_facts(rows, config, run_dir))}</header>",
        f'<section class="charts">{drawn}</section>',
        _sheets_html(run_dir, config),
        "<section><details><summary>Settings</summary>"
        f"<pre>{html.escape(json.dumps(config, indent=2))}</pre></details></section>",
    ]
    return write_text(run_dir / "index.html", html_page(title, "\n".join(parts), name="report"))


def _facts(rows: Sequence[dict], config: Mapping, run_dir: Path) -> dict[str, str]:
    """How far the run has come, and how long a step takes."""
    steps = (config.get("plan") or {}).get("steps")
    step = rows[-1]["step"] if rows else 0
    facts = {"step": f"{step:,}" + (f" of {steps:,}" if steps else "")}
    rate, memory = _last(rows, "images_per_s"), _last(rows, "memory_gb")
    if rate and config.get("batch_size"):
        pace = config["batch_size"] / rate
        facts |= {"a step": f"{pace:.3g} s", "images per second": f"{rate:.3g}"}
        if steps:
            at = datetime.fromtimestamp((run_dir / METRICS).stat().st_mtime)
            left = f"{readable_time(pace * (steps - step))}, as of {at:%Y-%m-%d %H:%M}"
            facts["left"] = "done" if step >= steps else left
    if memory:
        facts["peak memory"] = f"{memory:.3g} GB"
    return facts


def _last(rows: Sequence[dict], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


# -- curves ----------------------------------------------------------------------------------------
def metric_charts(rows: Sequence[dict], control: Sequence[dict] = ()) -> list[Chart]:
    """One chart per group of metrics, with the control's curves of the same names dashed.

    `_LOSSES` and `_MACHINERY` define groups. Other metrics share a chart if their names differ only
    in a final number ("x0", "x1") or in what follows a second slash ("a/b/c", "a/b/d").
    """
    own, other = _curves(rows), _curves(control)
    groups: dict[tuple[int, str, str], list[str]] = {}
    for name in own:
        groups.setdefault(_group(name), []).append(name)
    charts = []
    for (order, title, unit), names in sorted(groups.items(), key=lambda group: group[0][0]):
        short = [name.rpartition("/")[2] for name in names]
        if len(set(short)) < len(names):
            short = ["/".join(name.split("/")[-2:]) for name in names]
        series = []
        for tint, (name, called) in enumerate(zip(names, short, strict=True)):
            series.append(Series(called, own[name], tint))
            if name in other:
                series.append(Series(f"{called}, control", other[name], tint, dashed=True))
        machinery = order > len(_LOSSES)
        charts.append(Chart(title, "step", unit, tuple(series), from_zero=machinery))
    return charts


def _group(name: str) -> tuple[int, str, str]:
    """The chart that a metric belongs to: its place on the page, title and unit."""
    for first, known in ((0, _LOSSES), (len(_LOSSES) + 1, _MACHINERY)):
        for order, (words, title, unit) in enumerate(known, start=first):
            if re.fullmatch(words, name):
                return order, title, unit
    return len(_LOSSES), _kind(name), ""


def _kind(name: str) -> str:
    """The part of a metric's name that is the same for all metrics in its chart."""
    parent, _, last = name.rpartition("/")
    return parent if "/" in parent else f"{parent}/{re.sub(r'[0-9]+$', '', last)}".lstrip("/")


def _curves(rows: Sequence[dict]) -> dict[str, tuple[Point, ...]]:
    """The points (step, value) of every metric, without values that are not finite numbers."""
    curves: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most `_MOST_POINTS` points: means of neighbors, at the step of the last one."""
    size = -(-len(points) // _MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return tuple((part[-1][0], fmean(y for _, y in part)) for part in parts)


# -- sheets ----------------------------------------------------------------------------------------
def _sheets_html(run_dir: Path, config: Mapping) -> str:
    """The run's sheets, with a slider over time for each kind."""
    prompts = "".join(f"<li>{html.escape(str(p))}</li>" for p in config.get("sheet_prompts") or ())
    listed = f"<details><summary>Prompts</summary><ul>{prompts}</ul></details>"
    return _slider_html(run_dir, "", "Samples at fixed prompts and seed", listed) + _slider_html(
        run_dir, "_groups", "Best and worst of groups, with their rewards", ""
    )


def _slider_html(run_dir: Path, ending: str, title: str, below: str) -> str:
    """A section with the sheets named step_NUMBER + ending; "" if there are none."""
    named = re.compile(rf"step_(\d+){ending}")
    sheets = (run_dir / "samples").glob("*.png")
    found = {int(match[1]): s.name for s in sheets if (match := named.fullmatch(s.stem))}
    frames = [(f"samples/{name}", f"step {step:,}") for step, name in sorted(found.items())]
    if not frames:
        return ""
    return f"<section><h2>{title}</h2>{frames_html(frames, 'step')}{below}</section>"

"""Write the results of a benchmark as JSON, Markdown and a plot."""

import os
import platform
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from launch.measure import formulas
from launch.measure.peers import PEERS
from t2i.charts import save_figure
from t2i.errors import UserError
from t2i.evaluation.results import markdown_table, versions
from t2i.files import read_json, write_json, write_text

COLORS = ("#222222", "#d62626", "#f78a1a", "#2858d6", "#269c4c", "#8038ac", "#1aa3a3", "#777777")
_PEERS = "Peers: " + "; ".join(f"{name}: {about}" for name, about in PEERS.items()) + "."
NOTES = {
    "sampling": " ".join([formulas.TURNS, formulas.DRAWING, formulas.FLOOR, _PEERS]),
    "decoding": "The image tokenizer alone, in fp32.",
    "training": " ".join([formulas.TURNS, formulas.TRAINING, formulas.MFU]),
    "scaling": formulas.SCALING,
    "fits": formulas.FITS,
}
_COLUMNS = {
    "shape": ("shape", "{}"),
    "dtype": ("type", "{}"),
    "images": ("images", "{}"),
    "batch": ("batch", "{}"),
    "contender": ("contender", "{}"),
    "variable": ("grows", "{}"),
    "work": ("work", "{}"),
    "cost": ("cost", "{}"),
    "x": ("of it", "{:,}"),
    "ms_per_step": ("ms a step", "{:.2f}"),
    "s_per_step": ("s a step", "{:.3f}"),
    "seconds": ("s", "{:.3f}"),
    "ms_per_image": ("ms an image", "{:.1f}"),
    "ratio": ("ratio", "{:.2f}"),
    "images_per_s": ("images/s", "{:.3g}"),
    "first_s": ("first s", "{:.1f}"),
    "floor_ms": ("floor ms", "{:.3g}"),
    "of_floor": ("floor / time", "{:.1%}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_gb": ("peak GB", "{:.2f}"),
    "state_gb": ("state GB", "{:.2f}"),
    "estimate_gb": ("estimate GB", "{:.2f}"),
    "exponent": ("exponent", "{:.2f}"),
    "residual": ("residual", "{:.0%}"),
    "error": ("error", "{}"),
}
"""Titles and formats of a table's columns, by the keys of a row."""
_SPREAD = {"ms_per_step": "ms_quartiles", "s_per_step": "s_quartiles"}


def about(device: torch.device, command: str) -> dict[str, Any]:
    """The machine, the software, and the command line."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "device": card or f"{cpu_name()}, {torch.get_num_threads()} threads",
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "cuda": torch.version.cuda,
        "versions": versions() | {"torch": torch.__version__},
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def markdown(results: dict) -> str:
    """A report with tables of all rows."""
    info, machine = results["about"], results["machine"]
    speeds = [f"{machine['bandwidth'] / 1e9:.3g} GB/s"]
    speeds += [f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in machine["rates"].items()]
    lines = [
        f"`{info['command']}`",
        "",
        f"{info['device']}, torch {info['versions']['torch']}, {info['date']}; "
        f"{', '.join(speeds)} ({machine['source']}).",
    ]
    for name, note in NOTES.items():
        if rows := results["rows"].get(name):
            lines += ["", f"## {name}", "", note, "", _table(rows)]
    if any("peak_gb" in row for rows in results["rows"].values() for row in rows):
        lines += ["", formulas.MEMORY]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict]) -> str:
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    head = [_COLUMNS[key][0] for key in columns]
    return markdown_table(head, [[_cell(row, key) for key in columns] for row in rows])


def _cell(row: dict, key: str) -> str:
    if (value := row.get(key)) is None:
        return ""
    text = _COLUMNS[key][1]
    if (spread := row.get(_SPREAD.get(key, ""))) is None:
        return text.format(value)
    low, high = map(text.format, spread)
    return f"{text.format(value)} ({low}-{high})"


def refuse_other_files(stem: Path) -> None:
    """UserError if files that no earlier benchmark wrote would be overwritten."""
    paths = [Path(f"{stem}.{end}") for end in ("json", "md", "svg")]
    there, before = [str(path) for path in paths if path.exists()], None
    with suppress(UserError):  # missing, or not JSON
        before = read_json(paths[0])
    if there and not (isinstance(before, dict) and {"machine", "rows"} <= before.keys()):
        raise UserError(
            f"{', '.join(there)} would be overwritten, and no benchmark wrote it: give another --out"
        )


def write(results: dict, stem: Path) -> None:
    """Write STEM.json and STEM.md."""
    write_json(f"{stem}.json", results)
    write_text(f"{stem}.md", markdown(results))


# -- the plot --------------------------------------------------------------------------------------


def plot(results: dict, path: Path) -> bool:
    """Plot a panel for every group; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = _panels(results["rows"])
    if not panels:
        return True
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False).flatten()
    for (title, draw, rows), axis in zip(panels, axes[: len(panels)], strict=True):
        draw(axis, rows)
        axis.set_title(title, fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    save_figure(figure, path)
    return True


def _panels(rows: dict[str, list[dict]]) -> list[tuple]:
    """Title, drawing function and rows of every panel."""
    panels: list[tuple] = []
    groups: dict[tuple, list[dict]] = {}
    for row in rows.get("sampling", []):
        if "ms_per_step" in row:
            groups.setdefault((row["shape"], row["dtype"]), []).append(row)
    for (shape, dtype), own in groups.items():
        several = len({row["images"] for row in own}) > 1
        title = f"{shape}, {dtype}: ms per step"
        panels.append((title, _lines if several else _bars("ms_per_step"), own))
    groups = {}
    for row in rows.get("training", []):
        if "s_per_step" in row:
            groups.setdefault((row["shape"], row["dtype"], row["batch"]), []).append(row)
    for (shape, dtype, batch), own in groups.items():
        title = f"{shape}, {dtype}, batch {batch}: s per training step"
        panels.append((title, _bars("s_per_step"), own))
    grown = [row for row in rows.get("scaling", []) if "seconds" in row]
    for name in dict.fromkeys(row["variable"] for row in grown):
        own = [row for row in grown if row["variable"] == name]
        panels.append((f"seconds as {name} grows", _growth, own))
    return panels


def _bars(value: str):
    def draw(axis, rows: list[dict]) -> None:
        for place, row in enumerate(rows):
            low, high = row[_SPREAD[value]]
            error = [[row[value] - low], [high - row[value]]]
            peer = row["contender"] in PEERS or row["contender"].endswith("naive")
            axis.barh(place, row[value], xerr=error, color=COLORS[7 if peer else 3])
            if "floor_ms" in row:
                axis.plot([row["floor_ms"]] * 2, [place - 0.4, place + 0.4], color=COLORS[1])
        axis.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=7)
        axis.invert_yaxis()

    return draw


def _lines(axis, rows: list[dict]) -> None:
    for name, color in zip(dict.fromkeys(row["contender"] for row in rows), cycle(COLORS)):
        own = [row for row in rows if row["contender"] == name]
        x = [row["images"] for row in own]
        axis.plot(x, [row["ms_per_step"] for row in own], "o-", color=color, label=name, ms=3)
        if all("floor_ms" in row for row in own):
            axis.plot(x, [row["floor_ms"] for row in own], ":", color=color)
    axis.set(xscale="log", yscale="log", xlabel="images at once (dotted: floor)")
    axis.legend(fontsize=6)


def _growth(axis, rows: list[dict]) -> None:
    for work, color in zip(dict.fromkeys(row["work"] for row in rows), cycle(COLORS)):
        own = [row for row in rows if row["work"] == work]
        x = [row["x"] for row in own]
        axis.plot(x, [row["seconds"] for row in own], "o-", color=color, label=work)
    axis.set(xscale="log", yscale="log", xlabel=rows[0]["variable"])
    axis.legend(fontsize=7)

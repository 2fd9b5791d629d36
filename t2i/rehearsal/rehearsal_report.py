"""Compares a rehearsal's measurements with the predictions of the pre-flight check."""

import re
from collections.abc import Mapping

_LINES = {
    "state": "state, as above",
    "bucket": "gradient buckets",
    "frozen": "image tokenizer and text encoder",
    "kept": "activations of one pass",
    "passing": "temporary tensors",
    "stepping": "or during the optimizer step",
    "encoding": "while images are encoded",
    "weights": "a checkpoint",
    "training": "a checkpoint .* of weights,",
}
_UNITS = {"GB": 1e9, "MB": 1e6}
_HEAD = (
    "| stage | | s | CPU s | resident | its own | predicted | off by | read | on disk | off by |"
)
_MOST_OFF = 0.15


def predictions(report: str) -> dict[str, float]:
    """Bytes by name from the output of `--check`, with its "peak" (without the 10 % added for the
    allocator) and the size of a checkpoint ("saved").
    """
    found = {}
    for name, words in _LINES.items():
        if match := re.search(rf"^\s*{words}\s+([\d.]+) (GB|MB)", report, re.MULTILINE):
            found[name] = float(match[1]) * _UNITS[match[2]]

    def total(*names: str) -> float:
        return sum(found.get(name, 0) for name in names)

    moment = max(total("bucket", "kept", "passing"), total("stepping"))
    peak = max(total("state", "frozen") + moment, total("encoding"))
    return found | {"peak": peak, "saved": total("weights", "training")}


def summary(row: Mapping) -> str:
    """A stage's result in one line."""
    if "skipped" in row:
        return f"left out: {row['skipped']}"
    what = "" if row["done"] else f"FAILED with code {row['code']}: "
    return f"{what}{row['seconds']:.1f} s, {_gb(row['resident'])} resident"


def table(rows: Mapping[str, Mapping], about: Mapping[str, str]) -> str:
    """A Markdown table, with memory in GB. Predictions are compared with the memory beyond that of
    an empty process; differences of more than 15 % are bold.
    """
    empty = rows.get("libraries", {})
    lines = [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|"]
    for name, row in rows.items():
        first = f"| {name} | {about[name]}"
        if "skipped" in row or not row["done"]:
            lines.append(f"{first}: {summary(row)} |" + " |" * 9)
            continue
        kind, _, tuning = name.partition("-")
        said = rows.get(f"check-{tuning}", {}).get("predicted") if kind != "check" else None
        predicted = off = disk_off = ""
        if said and kind in ("train", "resume"):
            predicted, disk_off = _gb(said["peak"]), _off(row["bytes"], said.get("saved", 0))
            if empty.get("done"):
                off = _off(row["resident"] - empty["resident"], said["peak"])
        disk = _gb(row["bytes"]) if "bytes" in row else ""
        cells = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", _gb(row["resident"])]
        cells += [_gb(row["own"]), predicted, off, _gb(row["read"]), disk, disk_off]
        lines.append(f"{first} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _off(measured: float, predicted: float) -> str:
    if not predicted:
        return ""
    off = measured / predicted - 1
    return f"**{off:+.0%}**" if abs(off) > _MOST_OFF else f"{off:+.0%}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"

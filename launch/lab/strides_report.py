"""Make the table and the curve of docs/fewer_steps.md from the results of `launch/lab/strides.py`.

python launch/lab/strides_report.py --results docs/fewer_steps/strides/results.jsonl \\
    --out docs/fewer_steps/strides
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.lab.result_lines import Estimate, estimate
from t2i import cli
from t2i.charts import save_figure
from t2i.evaluation.results import markdown_table
from t2i.files import read_json_lines, writable_folder, write_text


@dataclass(frozen=True)
class StridesReport:
    """What to read and where to write."""

    results: Path = Path("runs/strides/results.jsonl")
    """Results of `launch/lab/strides.py`."""
    out: Path = Path("runs/strides-report")
    """Folder for table.md and curve.svg."""


@dataclass(frozen=True)
class DrawnWay:
    """One way of drawing one model, with a result line for each seed."""

    base: str
    arm: str
    stride: int
    lines: list[dict]

    def mean(self, name: str) -> float:
        return float(np.mean([line[name] for line in self.lines if name in line] or [np.nan]))

    def score(self) -> Estimate:
        return estimate(shares(self.lines))

    def losses(self) -> str:
        """Losses of the slots in nats per code, means over seeds."""
        found = [line["losses"] for line in self.lines if "losses" in line]
        return " / ".join(f"{loss:.2f}" for loss in np.mean(found, axis=0)) if found else ""


def shares(lines: Sequence[dict]) -> np.ndarray:
    """Shares of correct images [seeds, prompts]."""
    return np.array([np.array(x["correct"]) / x["study"]["samples"] for x in lines])


def drawn_ways(lines: Sequence[dict]) -> list[DrawnWay]:
    """Group result lines; of several for the same seed the last one counts."""
    found: dict[tuple[str, str, int], dict[int, dict]] = {}
    for line in lines:
        kind = line["study"]["base"], line["arm"], line["stride"]
        found.setdefault(kind, {})[line["seed"]] = line
    return [DrawnWay(*kind, [own[seed] for seed in sorted(own)]) for kind, own in found.items()]


def gain(way: DrawnWay, every: Sequence[DrawnWay]) -> Estimate | None:
    """Gain in score, paired by seed and prompt, over the control (for `ideal`, the base) drawn code
    by code; None for that way itself, or if they share no seed.
    """
    arm = "ideal" if way.arm == "ideal" else "control"
    for other in every:
        if (other.base, other.arm, other.stride) != (way.base, arm, 1) or other is way:
            continue
        control = {line["seed"]: line for line in other.lines}
        if ours := [line for line in way.lines if line["seed"] in control]:
            return estimate(shares(ours) - shares([control[line["seed"]] for line in ours]))
    return None


def table(every: Sequence[DrawnWay]) -> str:
    head = ["base", "arm", "stride", "seeds", "calls per code", "with speculation", "score"]
    head += ["against code by code", "losses of slots"]
    rows = []
    for one in every:
        gained, speculating = gain(one, every), one.mean("speculating_calls_per_code")
        rows.append(
            [
                *(Path(one.base).name, one.arm, one.stride, len(one.lines)),
                f"{one.mean('calls_per_code'):.2f}",
                "" if np.isnan(speculating) else f"{speculating:.2f}",
                one.score().told(),
                gained.told(signed=True) if gained else "",
                one.losses(),
            ]
        )
    return markdown_table(head, rows) + "\n"


def plot(every: Sequence[DrawnWay], path: Path) -> None:
    """Plot scores against calls per code, a panel per base, with exact speculation to compare."""
    from matplotlib.figure import Figure

    bases = list(dict.fromkeys(one.base for one in every))
    arms = list(dict.fromkeys(one.arm for one in every))
    figure = Figure(figsize=(4 * len(bases), 3.4), layout="constrained")
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        own = [one for one in every if one.base == base]
        for arm in dict.fromkeys(one.arm for one in own):
            style: dict = {"marker": "o", "color": f"C{arms.index(arm)}", "label": arm}
            line = [one for one in own if one.arm == arm]
            _errorbar(axes, line, "calls_per_code", style)
            if arm == "control":
                style = {"marker": "*", "ms": 11, "color": "black", "label": "exact speculation"}
                _errorbar(axes, line, "speculating_calls_per_code", style)
        axes.set(xlabel="calls per code", ylabel="score", title=Path(base).name, ylim=(0, None))
        axes.set_xlim(0, 1.05)
        axes.legend(fontsize=7)
    save_figure(figure, path)


def _errorbar(axes, ways: Sequence[DrawnWay], calls: str, style: dict) -> None:
    score = [one.score() for one in ways]
    x = [one.mean(calls) for one in ways]
    axes.errorbar(x, [each.mean for each in score], [each.error for each in score], **style)


def main() -> None:
    config = cli.parse(StridesReport, __doc__)
    every = drawn_ways(read_json_lines(config.results))
    writable_folder(config.out)
    print(write_text(config.out / "table.md", table(every)).read_text())
    plot(every, config.out / "curve.svg")


if __name__ == "__main__":
    cli.run(main)

"""Make the tables and the plot of docs/recipe.md from the results of `launch/lab/long_grid.py`.

    python launch/lab/long_report.py --results docs/recipe/presets/results.jsonl \\
        --out docs/recipe/presets

Every arm is compared with the control that has the same steps, data and rates, for the same seeds
and prompts. A score's standard error is the larger of those over seeds and over prompts; all other
standard errors are over seeds.

Shapes: R seeds, P prompts.
"""

import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.lab.result_lines import Estimate, estimate, over_seeds, rates
from t2i import cli
from t2i.charts import save_figure
from t2i.evaluation.results import markdown_table
from t2i.files import read_json_lines, writable_folder, write_text

_OWN, _NOISED = "validation/own_drafts/slot0", "validation/noised_truth/slot0"
_NUMBERS = (
    ("distance", "distance", 1, 2),
    ("recall", "recall", 1, 3),
    ("spread", "spread", 1, 3),
    ("loss on own drafts (mnat)", _OWN, 1000, 1),
    ("on noised truth (mnat)", _NOISED, 1000, 1),
)
"""Further columns of the main table: head, `number`'s name, scale, digits."""
_DRAFTS = (
    ("total variation to the final distribution, slots 1 .. k-1", "drafts", "total_variation"),
    ("draft right", "drafts", "right"),
    ("flipped between stages", "changes", "flipped"),
    ("stages that agree with the final", "changes", "agreeing"),
    ("last draft right", "repairs", "draft_right"),
    ("corrected", "repairs", "corrected"),
    ("by the control", "repairs", "control_corrected"),
    ("spoilt", "repairs", "spoilt"),
    ("by the control", "repairs", "control_spoilt"),
)
"""Further columns of the table of drafts: head, and where a line has the numbers."""


@dataclass(frozen=True)
class LongReport:
    """What to read and where to write."""

    results: Path = Path("runs/long/results.jsonl")
    """Result lines of `launch/lab/long_grid.py`."""
    out: Path = Path("runs/long-report")
    """Folder for tables.md and differences.svg."""


class Lines:
    """Result lines by base, arm and seed."""

    def __init__(self, lines: list[dict]):
        self.found: dict[tuple[str, str], dict[int, dict]] = {}
        for line in lines:
            self.found.setdefault((line["base"], line["arm"]), {})[line["seed"]] = line

    def bases(self) -> list[str]:
        return sorted({base for base, _ in self.found})

    def arms(self, base: str) -> dict[str, list[dict]]:
        """The lines of each arm, sorted by seed; arms are in the order in which they were run."""
        return {
            arm: [line for _, line in sorted(by_seed.items())]
            for (of, arm), by_seed in self.found.items()
            if of == base
        }

    def pairs(self, base: str, arm: str) -> list[tuple[dict, dict]]:
        """The arm's line and its control's for each seed that has both; empty for a control."""
        ours = self.found[base, arm]
        name = next(iter(ours.values()))["control"]
        control = self.found.get((base, name), {}) if name != arm else {}
        return [(line, control[seed]) for seed, line in sorted(ours.items()) if seed in control]


def gain(pairs: list[tuple[dict, dict]]) -> Estimate | None:
    """The arm's score minus its control's; None if there is no pair."""
    if not pairs:
        return None
    ours, control = zip(*pairs, strict=True)
    return estimate(rates(ours) - rates(control))


def number(line: dict, name: str) -> float:
    """The number or held-out loss of this name in a line; NaN if the line has neither."""
    return line.get(name, line.get("losses", {}).get(name, float("nan")))


def difference(pairs: list[tuple[dict, dict]], name: str, scale: float = 1) -> Estimate:
    """The arm's `number` minus its control's."""
    return over_seeds([scale * (number(a, name) - number(b, name)) for a, b in pairs])


def main_table(lines: Lines, base: str) -> str:
    """One row per arm: its score, and its numbers as differences from its control's; a control's
    own numbers are shown as they are.
    """
    head = ["arm", "seeds", "score", "score less its control's", *(n[0] for n in _NUMBERS)]
    rows = []
    for arm, own in lines.arms(base).items():
        pairs = lines.pairs(base, arm)
        gained = gain(pairs)
        cells = [arm, str(len(own)), estimate(rates(own)).told()]
        cells.append(gained.told(signed=True) if gained else "")
        for _, name, scale, digits in _NUMBERS:
            values = [scale * number(line, name) for line in own]
            found = difference(pairs, name, scale) if pairs else over_seeds(values)
            cell = found.told(digits, signed=bool(pairs))
            cells.append("" if np.isnan(found.mean) else cell)
        rows.append(cells)
    return table(head, rows)


def task_table(lines: Lines, base: str) -> str:
    """Scores by task, as means over seeds."""
    arms = lines.arms(base)
    tags = list(next(iter(arms.values()))[0]["tags"])
    rows = [
        [arm, *(f"{np.mean([x['tags'][tag] for x in own]):.3f}" for tag in tags)]
        for arm, own in arms.items()
    ]
    return table(["arm", *tags], rows)


def draft_table(lines: Lines, base: str) -> str:
    """What drafts know, how codes change from stage to stage, and whether the changes help: the
    shares of wrong last drafts that are corrected and of right ones that are spoilt.
    """
    head = ["arm", "loss on noised truth less on own drafts (mnat)", "losses of slots 1 .. k-1"]
    rows = []
    for arm, by_seed in lines.arms(base).items():
        own = [line for line in by_seed if _draft_losses(line)]
        if not own:
            continue
        trust = over_seeds([1000 * (number(x, _NOISED) - number(x, _OWN)) for x in own])
        cells = [arm, trust.told(1, signed=True), _each([_draft_losses(x) for x in own], ".2f")]
        for _, part, name in _DRAFTS:
            found = [x[part][name] for x in own if name in (x.get(part) or {})]
            cells.append(_each(found, ".3f" if name == "total_variation" else ".1%"))
        rows.append(cells)
    return table(head + [column for column, _, _ in _DRAFTS], rows)


def _draft_losses(line: dict) -> list[float]:
    """Held-out losses of slots 1 .. k-1 on own drafts."""
    named = sorted(line.get("losses", {}).items())
    return [loss for name, loss in named if "/own_drafts/" in name and name != _OWN]


def _each(by_seed: list, how: str) -> str:
    """Means over seeds, formatted; each seed has a number or a list of them."""
    means = np.atleast_1d(np.mean(by_seed, axis=0)) if by_seed else ()
    return " / ".join(f"{mean:{how}}" for mean in means)


def correlation_table(lines: Lines) -> str:
    """Rank correlation of the loss on own drafts with the score, over runs and over differences
    from the controls (needed because each seed holds out other images).
    """
    rows = []
    for base in lines.bases():
        runs = [x for own in lines.arms(base).values() for x in own if "losses" in x]
        pairs = [p for arm in lines.arms(base) for p in lines.pairs(base, arm) if "losses" in p[0]]
        if len(pairs) < 3:
            continue
        both = rank_correlation([number(x, _OWN) for x in runs], [x["score"] for x in runs])
        paired = rank_correlation(
            [number(a, _OWN) - number(b, _OWN) for a, b in pairs],
            [a["score"] - b["score"] for a, b in pairs],
        )
        rows.append([base, str(len(runs)), f"{both:+.2f}", f"{paired:+.2f}"])
    return table(["base", "runs", "rank correlation", "of differences to the control"], rows)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's coefficient; ties share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table without its empty columns."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return markdown_table([head[i] for i in kept], cells) if rows else "none"


def plot_gains(lines: Lines, path: Path) -> None:
    """Plot the score minus the control's by base and arm (drawn with the base's own settings), with
    one (thick) and two standard errors.
    """
    from matplotlib.figure import Figure

    found = {
        base: {
            arm: one
            for arm, own in lines.arms(base).items()
            if "losses" in own[0] and (one := gain(lines.pairs(base, arm)))
        }
        for base in lines.bases()
    }
    arms = list(dict.fromkeys(arm for by_arm in found.values() for arm in by_arm))[::-1]
    if not arms:
        return
    figure = Figure(figsize=(8, 0.36 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#999999", linewidth=1)
    for i, (base, color) in enumerate(zip(found, cycle(("#d62626", "#2858d6", "#8038ac")))):
        for arm, one in found[base].items():
            y = arms.index(arm) + 0.24 * (0.5 - i)
            for times, width in ((2, 1), (1, 3)):
                ends = [one.mean + sign * times * one.error for sign in (-1, 1)]
                axes.plot(ends, [y, y], color=color, linewidth=width)
            axes.plot([one.mean], [y], "o", color=color)
        axes.plot([], [], "o-", color=color, label=base)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="score less the control's")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    config = cli.parse(LongReport, __doc__)
    lines = Lines(read_json_lines(config.results))
    writable_folder(config.out)
    parts = []
    for base in lines.bases():
        parts += [f"### {base}: scores and likeness", main_table(lines, base)]
        parts += [f"### {base}: by task", task_table(lines, base)]
        parts += [f"### {base}: drafts", draft_table(lines, base)]
    parts += ["### Own-drafts loss and score", correlation_table(lines)]
    print(write_text(config.out / "tables.md", "\n\n".join(parts) + "\n").read_text())
    plot_gains(lines, config.out / "differences.svg")


if __name__ == "__main__":
    cli.run(main)

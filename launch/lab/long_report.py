"""The tables and the plot of docs/recipe.md, from the results of `launch/lab/long_grid.py`.

    python launch/lab/long_report.py --results docs/recipe/long/results.jsonl \\
        --out docs/recipe/long

Every arm is compared with the control that shares its steps, data and rates, seed by seed and
prompt by prompt. A standard error of a score is the larger of two, over seeds and over prompts; all
others are over seeds.

Shapes: R seeds, P prompts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.lab.recipe_report import Estimate, estimate, plot_gains
from t2i import cli
from t2i.evaluation.results import markdown_table
from t2i.files import read_json_lines, writable_folder, write_text

TASKS = 6
_OWN, _NOISED = "validation/own_drafts/slot0", "validation/noised_truth/slot0"


@dataclass(frozen=True)
class LongReport:
    """What to read and where to write."""

    results: Path = Path("runs/long/results.jsonl")
    """Lines of `launch/lab/long_grid.py`."""
    out: Path = Path("runs/long-report")
    """Folder for tables.md and differences.svg."""


class Lines:
    """Result lines by base and arm; each a dictionary by seed."""

    def __init__(self, lines: list[dict]):
        self.found: dict[tuple[str, str], dict[int, dict]] = {}
        for line in lines:
            self.found.setdefault((line["base"], line["arm"]), {})[line["seed"]] = line

    def bases(self) -> list[str]:
        return sorted({base for base, _ in self.found})

    def arms(self, base: str) -> list[str]:
        """In the order in which they were done."""
        return [arm for of, arm in self.found if of == base]

    def pairs(self, base: str, arm: str) -> list[tuple[dict, dict]]:
        """Lines of the seeds that the arm and its control share."""
        ours = self.found[base, arm]
        control = self.found.get((base, next(iter(ours.values()))["control"]), {})
        return [(line, control[seed]) for seed, line in sorted(ours.items()) if seed in control]

    def is_control(self, base: str, arm: str) -> bool:
        return next(iter(self.found[base, arm].values()))["control"] == arm


def rates(lines: list[dict]) -> np.ndarray:
    """[R, P]"""
    return np.array([x["correct"] for x in lines]) / lines[0]["settings"]["samples"]


def gain(pairs: list[tuple[dict, dict]]) -> Estimate | None:
    """Of the score against the control."""
    if not pairs:
        return None
    ours, control = zip(*pairs, strict=True)
    return estimate(rates(list(ours)) - rates(list(control)), TASKS)


def over_seeds(values: list[float]) -> Estimate:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), float(error))


def shown(found: Estimate | None, digits: int, *, signed: bool = True) -> str:
    """Mean ± error; the error is left out where one seed tells none."""
    if found is None:
        return ""
    told = f"{found.mean:{'+' if signed else ''}.{digits}f}"
    return told if np.isnan(found.error) else f"{told} ± {found.error:.{digits}f}"


def difference(pairs: list[tuple[dict, dict]], name: str, scale: float = 1) -> Estimate | None:
    """Of a number of the line, or of a held-out loss, against the control."""

    def value(line: dict) -> float:
        return line["losses"][name] if "/" in name else line[name]

    return over_seeds([scale * (value(a) - value(b)) for a, b in pairs]) if pairs else None


def main_table(lines: Lines, base: str) -> str:
    """One row per arm: the score, and differences to its control."""
    head = (
        "| arm | seeds | score | score less its control's | distance | recall | spread "
        "| loss on own drafts (mnat) |"
    )
    rows = []
    for arm in lines.arms(base):
        own = list(lines.found[base, arm].values())
        pairs = [] if lines.is_control(base, arm) else lines.pairs(base, arm)
        score = estimate(rates(own), TASKS)
        first = [arm, str(len(own)), str(score)]
        if not pairs:
            known = [over_seeds([x[n] for x in own]) for n in ("distance", "recall", "spread")]
            told = [shown(x, d, signed=False) for x, d in zip(known, (2, 3, 3), strict=True)]
            loss = over_seeds([1000 * x["losses"][_OWN] for x in own])
            rows.append([*first, "", *told, shown(loss, 0, signed=False)])
            continue
        rows.append(
            [
                *first,
                shown(gain(pairs), 3),
                *(
                    shown(difference(pairs, name), digits)
                    for name, digits in (("distance", 2), ("recall", 3), ("spread", 3))
                ),
                shown(difference(pairs, _OWN, 1000), 1),
            ]
        )
    return markdown_table(head, rows)


def task_table(lines: Lines, base: str) -> str:
    """Scores by task, means over seeds."""
    tags = list(next(iter(lines.found[base, lines.arms(base)[0]].values()))["tags"])
    rows = []
    for arm in lines.arms(base):
        own = list(lines.found[base, arm].values())
        rows.append([arm, *(f"{np.mean([x['tags'][tag] for x in own]):.3f}" for tag in tags)])
    return markdown_table(f"| arm | {' | '.join(tags)} |", rows)


def draft_table(lines: Lines, base: str) -> str:
    """What drafts know, and how codes change from stage to stage."""
    head = (
        "| arm | loss on noised truth less on own drafts (mnat) | losses of slots 1 .. k-1 "
        "| total variation to the final distribution, slots 1 .. k-1 | draft right "
        "| flipped between stages | stages that agree with the final |"
    )
    rows = []
    for arm in lines.arms(base):
        own = [x for x in lines.found[base, arm].values() if "drafts" in x]
        if not own:
            continue
        trust = over_seeds([1000 * (x["losses"][_NOISED] - x["losses"][_OWN]) for x in own])
        slots = range(1, len(own[0]["drafts"]["right"]) + 1)
        later = [[x["losses"][f"validation/own_drafts/slot{j}"] for j in slots] for x in own]
        rows.append(
            [
                *(arm, shown(trust, 1)),
                _each(later, ".2f"),
                _each([x["drafts"]["total_variation"] for x in own], ".3f"),
                _each([x["drafts"]["right"] for x in own], ".1%"),
                _each([x["changes"]["flipped"] for x in own], ".1%"),
                _each([x["changes"]["agreeing"] for x in own], ".1%"),
            ]
        )
    return markdown_table(head, rows)


def _each(by_seed: list[list[float]], how: str) -> str:
    return " / ".join(f"{value:{how}}" for value in np.mean(by_seed, axis=0))


def gains(lines: Lines) -> dict[str, dict[str, Estimate]]:
    """Of every arm with a control, by base."""
    found: dict[str, dict[str, Estimate]] = {base: {} for base in lines.bases()}
    for base, arm in lines.found:
        one = None if lines.is_control(base, arm) else gain(lines.pairs(base, arm))
        if one is not None:
            found[base][arm] = one
    return found


def main() -> None:
    config = cli.parse(LongReport, __doc__)
    lines = Lines(read_json_lines(config.results))
    writable_folder(config.out)
    parts = []
    for base in lines.bases():
        parts += [f"### {base}: scores and likeness", main_table(lines, base)]
        parts += [f"### {base}: by task", task_table(lines, base)]
        parts += [f"### {base}: drafts", draft_table(lines, base)]
    print(write_text(config.out / "tables.md", "\n\n".join(parts) + "\n").read_text())
    if any(gains(lines).values()):
        plot_gains(gains(lines), config.out / "differences.svg")


if __name__ == "__main__":
    cli.run(main)

"""The tables and plots of docs/recipe.md, from the results of `launch/lab/experiment.py`.

    python launch/lab/recipe_report.py --results docs/recipe/presets/results.jsonl \\
        --out docs/recipe/presets --samples 3

Writes tables.md and the plots. A standard error is the larger of two: over training seeds, and over
prompts (stratified by task, of the mean over seeds); differences to the control are taken seed by
seed and prompt by prompt before that.

Shapes: R seeds, P prompts.
"""

import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.evaluation.results import markdown_table
from t2i.files import read_json_lines, writable_folder, write_text

CONTROL = "control"
COLORS = ("#222222", "#d62626", "#f78a1a", "#2858d6", "#269c4c", "#8038ac")


@dataclass(frozen=True)
class ReportOptions:
    """What to read and where to write."""

    results: Path = Path("runs/experiments/results.jsonl")
    """Lines of `launch/lab/experiment.py`."""
    out: Path = Path("docs/recipe")
    """Folder for tables.md and the plots."""
    tasks: int = 6
    """Tasks of the benchmark; their prompts stand one after the other."""
    samples: int = 4
    """Images per prompt."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN where one seed and one prompt tell nothing)."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"

    def signed(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def estimate(rates_RP: np.ndarray, tasks: int) -> Estimate:
    """Mean of per-prompt rates (or differences), with the larger of the two standard errors."""
    seeds = len(rates_RP)
    by_task = rates_RP.mean(0).reshape(tasks, -1)
    over_prompts = np.sqrt((by_task.var(1, ddof=1) / by_task.shape[1]).sum()) / tasks
    over_seeds = rates_RP.mean(1).std(ddof=1) / np.sqrt(seeds) if seeds > 1 else 0.0
    return Estimate(float(rates_RP.mean()), float(max(over_prompts, over_seeds)))


class Results:
    """Result lines, looked up by base, arm and way of sampling."""

    def __init__(self, lines: list[dict], config: ReportOptions):
        self.config = config
        self.lines = {
            (x["base"], x["arm"], x["seed"], x["step"], x["steps"], x["sampling"]): x for x in lines
        }

    def bases(self) -> list[str]:
        return sorted({key[0] for key in self.lines})

    def find(self, base: str, arm: str, sampling: str = "") -> dict:
        """The final results of an arm, by seed."""
        found = {
            key[2]: line
            for key, line in self.lines.items()
            if key[:2] == (base, arm) and key[3] == key[4] and key[5] == sampling
        }
        return dict(sorted(found.items()))

    def names(self, base: str) -> list[tuple[str, str]]:
        """Arms and ways of sampling in the order in which they were run."""
        seen = {(key[1], key[5]): None for key in self.lines if key[0] == base and key[3] == key[4]}
        return list(seen)

    def rates(self, by_seed: dict) -> np.ndarray:
        return np.array([x["correct"] for x in by_seed.values()]) / self.config.samples

    def score(self, base: str, arm: str, sampling: str = "") -> Estimate:
        return estimate(self.rates(self.find(base, arm, sampling)), self.config.tasks)

    def gain(self, base: str, arm: str, sampling: str = "") -> Estimate | None:
        """Against the control with the base's own sampling; None without common seeds."""
        ours, control = self.find(base, arm, sampling), self.find(base, CONTROL)
        common = [seed for seed in ours if seed in control]
        if not common or (arm == CONTROL and not sampling):
            return None
        difference = self.rates({s: ours[s] for s in common}) - self.rates(
            {s: control[s] for s in common}
        )
        return estimate(difference, self.config.tasks)


def losses(by_seed: dict, kind: str) -> str:
    """Mean over seeds by slot, with the standard error of slot 0."""
    rows = [
        [v for k, v in sorted(x["losses"].items()) if f"/{kind}/" in k] for x in by_seed.values()
    ]
    table = np.array(rows)
    error = table[:, 0].std(ddof=1) / np.sqrt(len(table)) if len(table) > 1 else float("nan")
    first, *drafts = table.mean(0)
    spread = f" ± {error:.3f}" if len(table) > 1 else ""
    return " / ".join([f"{first:.3f}{spread}", *(f"{v:.2f}" for v in drafts)])


def loss_gain(results: Results, base: str, arm: str, kind: str) -> str:
    """Slot 0's loss less that of the same seed's control, over seeds, in thousandths of a nat.

    The seeds hold out different images, whose losses differ by far more than the arms'; a
    difference within a seed is exact.
    """
    ours, control = results.find(base, arm), results.find(base, CONTROL)
    name = f"validation/{kind}/slot0"
    pairs = [(ours[s]["losses"], control[s]["losses"]) for s in ours if s in control]
    if arm == CONTROL or not pairs:
        return ""
    difference = 1000 * np.array([a[name] - b[name] for a, b in pairs])
    spread = f" ± {difference.std(ddof=1) / np.sqrt(len(pairs)):.1f}" if len(pairs) > 1 else ""
    return f"{difference.mean():+.1f}{spread}"


def arm_table(results: Results, base: str) -> str:
    """One row per arm, sampled in the base's own way."""
    head = (
        "| arm | seeds | score | against the control | slot loss, noised truth | slot loss, own drafts "
        "| slot 0 less the control's, noised truth (mnat) | own drafts (mnat) |"
    )
    kinds = ("noised_truth", "own_drafts")
    return markdown_table(
        head,
        (
            [
                *(arm, str(len(results.find(base, arm)))),
                *(str(results.score(base, arm)), _signed(results.gain(base, arm))),
                *(losses(results.find(base, arm), kind) for kind in kinds),
                *(loss_gain(results, base, arm, kind) for kind in kinds),
            ]
            for arm, sampling in results.names(base)
            if not sampling
        ),
    )


def sampling_table(results: Results, base: str) -> str:
    """One row per way of sampling from the same runs."""
    varied = {arm for arm, sampling in results.names(base) if sampling}
    names = sorted(results.names(base), key=lambda name: name[0])
    return markdown_table(
        "| arm | sampling | seeds | score | against the control |",
        (
            [
                *(arm, sampling or "as the base", str(len(results.find(base, arm, sampling)))),
                str(results.score(base, arm, sampling)),
                _signed(results.gain(base, arm, sampling)),
            ]
            for arm, sampling in names
            if arm in varied
        ),
    )


def _signed(gain: Estimate | None) -> str:
    return gain.signed() if gain else ""


def refinement_table(results: Results, base: str) -> str:
    """What happens to drafts, in sampled images and on held-out ones."""
    head = (
        "| arm | codes flipped 1-2 / 2-3 / 3-4 | stage 1 / 2 / 3 = final | last draft right "
        "| corrected | control there | spoilt | control there |"
    )
    columns = [("changes", "flipped"), ("changes", "agreeing"), ("repairs", "draft_right")]
    columns += [
        ("repairs", f"{whose}{what}")
        for what in ("corrected", "spoilt")
        for whose in ("", "control_")
    ]

    def mean(found: list[dict], part: str, name: str) -> str:
        values = np.mean([np.atleast_1d(x[part][name]) for x in found], axis=0)
        return " / ".join(f"{v:.1%}" for v in values)

    rows = []
    for arm, sampling in results.names(base):
        found = [x for x in results.find(base, arm).values() if "repairs" in x]
        if found and not sampling:
            rows.append([arm, *(mean(found, *column) for column in columns)])
    return markdown_table(head, rows)


@dataclass(frozen=True)
class Outcome:
    """One run, sampled in the base's own way."""

    base: str
    arm: str
    seed: int
    loss: float
    """Of slot 0 on own drafts, in the end."""
    score: float


def outcomes(results: Results) -> list[Outcome]:
    return [
        Outcome(base, arm, seed, line["losses"]["validation/own_drafts/slot0"], line["score"])
        for base in results.bases()
        for arm, sampling in results.names(base)
        if not sampling
        for seed, line in results.find(base, arm).items()
    ]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's coefficient; ties share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def correlation_lines(results: Results) -> str:
    """Rank correlation of loss and score by base, of runs and of differences to their control.

    A seed holds out its own images, so that losses differ between seeds for a reason that has
    nothing to do with the arms.
    """
    rows = []
    for base in results.bases():
        runs = [run for run in outcomes(results) if run.base == base]
        if len(runs) < 3:
            continue
        controls = {run.seed: run for run in runs if run.arm == CONTROL}
        pairs = [(r, controls[r.seed]) for r in runs if r.arm != CONTROL and r.seed in controls]
        both = rank_correlation([r.loss for r in runs], [r.score for r in runs])
        paired = rank_correlation(
            [r.loss - c.loss for r, c in pairs], [r.score - c.score for r, c in pairs]
        )
        rows.append([base, str(len(runs)), f"{both:+.2f}", f"{paired:+.2f}"])
    return markdown_table(
        "| base | runs | rank correlation | of differences to the control |", rows
    )


def save_figure(figure, path: Path) -> None:
    """Write an SVG that depends on the figure alone: plots change with their data only."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def plot_correlation(results: Results, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs, bases = outcomes(results), results.bases()
    figure = Figure(figsize=(4.2 * len(bases), 3.4), layout="constrained")
    for base, axes in zip(bases, np.atleast_1d(figure.subplots(1, len(bases))), strict=True):
        arms = list(dict.fromkeys(run.arm for run in runs if run.base == base))
        colors = COLORS if len(arms) <= len(COLORS) else colormaps["tab20"](range(20))
        for arm, color in zip(arms, cycle(colors)):  # no arm is left out
            points = [(run.loss, run.score) for run in runs if (run.base, run.arm) == (base, arm)]
            axes.scatter(*zip(*points, strict=True), s=16, color=color, label=arm)
        axes.legend(fontsize=7)
        axes.set(title=base, xlabel="held-out loss of slot 0, own drafts", ylabel="score")
    save_figure(figure, path)


def plot_gains(gains: dict[str, dict[str, Estimate]], path: Path) -> None:
    """By base and arm: score less the control's, with one (thick) and two standard errors."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for by_arm in gains.values() for arm in by_arm))[::-1]
    figure = Figure(figsize=(8, 0.36 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#999999", linewidth=1)
    for i, (base, color) in enumerate(zip(gains, cycle(COLORS[1::2]))):
        for arm, gain in gains[base].items():
            y = arms.index(arm) + 0.24 * (0.5 - i)
            for times, width in ((2, 1), (1, 3)):
                ends = [gain.mean + sign * times * gain.error for sign in (-1, 1)]
                axes.plot(ends, [y, y], color=color, linewidth=width)
            axes.plot([gain.mean], [y], "o", color=color)
        axes.plot([], [], "o-", color=color, label=base)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="score less the control's")
    axes.legend()
    save_figure(figure, path)


def plot_courses(results: Results, arms: list[str], path: Path) -> None:
    """Per base: score and own-drafts losses of slot 0 and 1 against steps, means over seeds."""
    from matplotlib.figure import Figure

    bases = results.bases()
    figure = Figure(figsize=(12, 3.2 * len(bases)), layout="constrained")
    rows = figure.subplots(len(bases), 3, squeeze=False)
    for base, (score, first, drafts) in zip(bases, rows, strict=True):
        for arm, color in zip(arms, cycle(COLORS)):  # no arm is left out
            steps, means, errors = score_course(results, base, arm)
            score.errorbar(steps, means, errors, marker="o", capsize=3, color=color, label=arm)
            for kind, style in (("own_drafts", "-"), ("noised_truth", ":")):
                for axes, slot in ((first, 0), (drafts, 1)):
                    axes.plot(*loss_course(results, base, arm, kind, slot), style, color=color)
        score.set(title=f"{base}: score", xlabel="steps")
        first.set(title="held-out loss, slot 0 (dotted: noised truth)", xlabel="steps")
        drafts.set(title="held-out loss, slot 1", xlabel="steps")
        score.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    save_figure(figure, path)


def score_course(
    results: Results, base: str, arm: str
) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean scores over seeds and their standard errors."""
    found: dict[int, list[list[int]]] = {}
    for (b, a, _, step, _, sampling), line in results.lines.items():
        if (b, a, sampling) == (base, arm, ""):
            found.setdefault(step, []).append(line["correct"])
    config, steps = results.config, sorted(found)
    estimates = [estimate(np.array(found[s]) / config.samples, config.tasks) for s in steps]
    return steps, [e.mean for e in estimates], [e.error for e in estimates]


def loss_course(
    results: Results, base: str, arm: str, kind: str, slot: int
) -> tuple[list[int], list[float]]:
    name = f"validation/{kind}/slot{slot}"
    rows = [row for x in results.find(base, arm).values() for row in x["course"] if name in row]
    steps = sorted({row["step"] for row in rows})
    return steps, [float(np.mean([r[name] for r in rows if r["step"] == s])) for s in steps]


def gains(results: Results) -> dict[str, dict[str, Estimate]]:
    """Of every arm, sampled in the base's own way."""
    found = {
        base: {arm: results.gain(base, arm) for arm, way in results.names(base) if not way}
        for base in results.bases()
    }
    return {b: {a: gain for a, gain in by.items() if gain} for b, by in found.items()}


def main() -> None:
    config = cli.parse(ReportOptions, __doc__)
    results = Results(read_json_lines(config.results), config)
    writable_folder(config.out)
    parts = []
    for base in results.bases():
        parts += [f"### {base}: training", arm_table(results, base)]
        parts += [f"### {base}: sampling", sampling_table(results, base)]
        parts += [f"### {base}: what refinement does", refinement_table(results, base)]
    parts += ["### Own-drafts loss and score", correlation_lines(results)]
    print(write_text(config.out / "tables.md", "\n\n".join(parts) + "\n").read_text())
    courses = [
        arm
        for arm in dict.fromkeys(arm for base in results.bases() for arm, _ in results.names(base))
        if any(len(score_course(results, base, arm)[0]) > 1 for base in results.bases())
    ]
    if courses:
        plot_courses(results, courses, config.out / "courses.svg")
    plot_correlation(results, config.out / "loss_and_score.svg")
    plot_gains(gains(results), config.out / "differences.svg")


if __name__ == "__main__":
    cli.run(main)

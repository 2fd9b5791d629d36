"""Two results of one benchmark against each other: paired bootstrap over prompts.

Both models are given the same resampled prompts, so that what a prompt's difficulty adds to both
scores cancels and small differences become visible. Differences are B - A.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2i.errors import UserError
from t2i.evaluation.bootstrap import RESAMPLES, resampled_means
from t2i.evaluation.results import read_results

Groups = Mapping[str, Mapping[str, Sequence[float]]]
"""Group (such as a task, or a category) -> prompt -> its values (of its images, or of its answers).
"""


@dataclass(frozen=True)
class Difference:
    """One group's means, and their difference with its bootstrap standard error and 95 % interval.

    The last three are None where a single prompt gives no idea of the spread.
    """

    a: float
    b: float
    stderr: float | None
    low: float | None
    high: float | None
    prompts: int

    @property
    def difference(self) -> float:
        return self.b - self.a


def paired_differences(
    a: Groups, b: Groups, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Difference, dict[str, Difference]]:
    """The difference overall (the unweighted mean of the groups) and by group.

    Raises:
        UserError: the two were not asked the same prompts.
    """
    prompts_a, prompts_b = ({(g, p) for g in groups for p in groups[g]} for groups in (a, b))
    if prompts_a != prompts_b or not prompts_a:
        raise UserError(
            "the two results are not about the same prompts: "
            f"{len(prompts_a & prompts_b)} in both, {len(prompts_a - prompts_b)} only in A, "
            f"{len(prompts_b - prompts_a)} only in B; judge both on the same prompts (and --limit)"
        )
    by_group, drawn = {}, []
    for name in a:
        means, resampled = [], []
        for values in (a[name], b[name]):
            ordered = [values[prompt] for prompt in sorted(values)]
            totals, counts = (
                np.array([sum(v) for v in ordered]),
                np.array([len(v) for v in ordered]),
            )
            rng = np.random.default_rng(
                [seed, zlib.crc32(name.encode())]
            )  # the same draws for both
            resampled.append(resampled_means(totals, counts, rng, resamples))
            means.append(float(totals.sum() / counts.sum()))
        differences_R = resampled[1] - resampled[0]
        by_group[name] = _difference(*means, differences_R, len(a[name]), known=len(a[name]) > 1)
        drawn.append(differences_R)
    overall = _difference(
        float(np.mean([d.a for d in by_group.values()])),
        float(np.mean([d.b for d in by_group.values()])),
        np.mean(drawn, axis=0),
        len(prompts_a),
        known=all(d.stderr is not None for d in by_group.values()),
    )
    return overall, by_group


def _difference(
    a: float, b: float, drawn_R: np.ndarray, prompts: int, *, known: bool
) -> Difference:
    if not known:
        return Difference(a, b, None, None, None, prompts)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    return Difference(a, b, float(drawn_R.std(ddof=1)), float(low), float(high), prompts)


def compare_folders(
    a: Path, b: Path, groups_of: Callable[[list[dict]], Groups], *, mean_of_groups: bool = True
) -> str:
    """A markdown table of B against A; both are output folders of one benchmark.

    Args:
        groups_of: the benchmark's rows as groups.
        mean_of_groups: whether the groups' unweighted mean is a score of the benchmark, to be
            printed first.

    Raises:
        UserError: a folder has no results, or the two are of other benchmarks, judges or prompts.
    """
    results_a, rows_a = read_results(a)
    results_b, rows_b = read_results(b)
    who_a, who_b = _who(results_a), _who(results_b)
    if who_a != who_b:
        raise UserError(
            f"{a} and {b} were judged differently, so their numbers cannot be compared:\nA: {who_a}\nB: {who_b}"
        )
    overall, by_group = paired_differences(groups_of(rows_a), groups_of(rows_b))
    digits = results_a["decimals"]
    notes = [
        f"**{name}: {results['status']}**\n"
        for name, results in (("A", results_a), ("B", results_b))
        if results["status"] != "complete"
    ]
    versions = [results["judge"]["versions"] for results in (results_a, results_b)]
    if versions[0] != versions[1]:
        notes.append(f"judged with different versions: {versions[0]} and {versions[1]}\n")
    head = f"{results_a['benchmark']}: {results_a['label']}"
    lines = [f"| {head} | A | B | B - A | ± | 95 % interval | prompts |", "|---" * 7 + "|"]
    shown = {"overall": overall, **by_group} if mean_of_groups else by_group
    for name, difference in shown.items():
        headline = results_a["scores"].get(name, {}).get("headline")
        lines.append(_line(f"**{name}**" if headline else name, difference, digits))
    legend = f"A: {a}\nB: {b}\n± and interval: paired bootstrap over prompts; * where the interval leaves out 0."
    return "\n".join([f"{legend}\n", *notes, *lines])


def _who(results: dict) -> dict:
    """What must be equal for numbers to be comparable: the judge, but not the versions of its
    code.
    """
    judge = {key: value for key, value in results["judge"].items() if key != "versions"}
    return {"benchmark": results["benchmark"], **judge}


def _line(name: str, d: Difference, digits: int) -> str:
    numbers = f"{d.a:.{digits}f} | {d.b:.{digits}f} | {d.difference:+.{digits}f}"
    if d.stderr is None:
        return f"| {name} | {numbers} | - | - | {d.prompts} |"
    clear = " *" if d.low > 0 or d.high < 0 else ""
    interval = f"{d.low:+.{digits}f} to {d.high:+.{digits}f}{clear}"
    return f"| {name} | {numbers} | {d.stderr:.{digits}f} | {interval} | {d.prompts} |"

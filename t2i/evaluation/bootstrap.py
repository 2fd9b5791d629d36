"""Standard errors and differences by bootstrap over prompts. The images of one prompt are
correlated, so whole prompts are redrawn.

Both models get the same resampled prompts: the difficulty of a prompt, which affects both scores,
cancels, and small differences become visible. Differences are B - A.

Shapes: P prompts, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t2i.errors import UserError

_RESAMPLES = 1000
Groups = Mapping[str, Mapping[str, Sequence[float]]]
"""Group (such as a task or a category) -> prompt -> its values, one per image or answer."""


@dataclass(frozen=True)
class PromptMean:
    """A mean over all values of all prompts.

    stderr: None for a single prompt, which does not show the spread.
    """

    mean: float
    stderr: float | None
    total: float
    count: int
    prompts: int


def mean_over_prompts(
    prompts: Sequence[Sequence[float]], name: str | None = None, *, seed: int = 0
) -> tuple[PromptMean, np.ndarray]:
    """The mean over all values of all prompts, and its resampled means [R]: each is that of P
    prompts drawn with replacement. Their standard deviation is the standard error of the mean.

    name: what is averaged; each name has its own random numbers.
    """
    totals_P, counts_P = np.array([sum(v) for v in prompts]), np.array([len(v) for v in prompts])
    if len(prompts) == 0 or counts_P.min() < 1:
        raise ValueError("every prompt needs at least one image; leave out those without")
    rng = np.random.default_rng(seed if name is None else [seed, zlib.crc32(name.encode())])
    drawn_RP = rng.integers(len(prompts), size=(_RESAMPLES, len(prompts)))
    means_R = totals_P[drawn_RP].sum(axis=1) / counts_P[drawn_RP].sum(axis=1)
    stderr = float(means_R.std(ddof=1)) if len(prompts) > 1 else None
    total, count = float(totals_P.sum()), int(counts_P.sum())
    return PromptMean(total / count, stderr, total, count, len(prompts)), means_R


@dataclass(frozen=True)
class Difference:
    """One group's means; the bootstrap standard error and 95 % interval of their difference.

    stderr, low and high are None for a single prompt, which does not show the spread.
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


def paired_differences(a: Groups, b: Groups) -> tuple[Difference, dict[str, Difference]]:
    """The overall difference (between the unweighted means of the groups), and that of each group.

    Raises:
        UserError: the two results are not about the same prompts.
    """
    of_a, of_b = ({(g, p) for g in groups for p in groups[g]} for groups in (a, b))
    # A prompt that is in several groups is counted once.
    in_a, in_b = ({prompt for _, prompt in pairs} for pairs in (of_a, of_b))
    if of_a != of_b or not of_a:
        raise UserError(
            "the two results are not about the same prompts: "
            f"{len(in_a & in_b)} in both, {len(in_a - in_b)} only in A, "
            f"{len(in_b - in_a)} only in B; judge both on the same prompts (and --limit)"
        )
    by_group, drawn = {}, []
    for name in a:
        # Both get the same draws, because they have the same name and prompts.
        (mean_a, means_a), (mean_b, means_b) = (
            mean_over_prompts([values[prompt] for prompt in sorted(values)], name)
            for values in (a[name], b[name])
        )
        drawn.append(means_b - means_a)
        spread_R = drawn[-1] if mean_a.prompts > 1 else None
        by_group[name] = _difference(mean_a.mean, mean_b.mean, spread_R, mean_a.prompts)
    known = all(d.stderr is not None for d in by_group.values())
    overall = _difference(
        float(np.mean([d.a for d in by_group.values()])),
        float(np.mean([d.b for d in by_group.values()])),
        np.mean(drawn, axis=0) if known else None,
        len(in_a),
    )
    return overall, by_group


def _difference(a: float, b: float, drawn_R: np.ndarray | None, prompts: int) -> Difference:
    if drawn_R is None:
        return Difference(a, b, None, None, None, prompts)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    return Difference(a, b, float(drawn_R.std(ddof=1)), float(low), float(high), prompts)

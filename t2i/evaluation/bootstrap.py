"""Bootstrap over prompts: the images of one prompt are correlated, so prompts are what is redrawn.

Shapes: P prompts, R resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000


def resampled_means(
    totals: np.ndarray, counts: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means over images of `resamples` draws of P prompts with replacement; float64 [R].

    totals: float [P], the sum over each prompt's images; counts: int [P], their number (>= 1).
    The standard deviation of the result is the standard error of `totals.sum() / counts.sum()`.
    """
    totals_P, counts_P = np.asarray(totals, dtype=np.float64), np.asarray(counts)
    assert totals_P.shape == counts_P.shape, (totals_P.shape, counts_P.shape)
    if len(counts_P) == 0 or counts_P.min() < 1:
        raise ValueError("every prompt needs at least one image; leave out those without")
    drawn_RP = rng.integers(len(totals_P), size=(resamples, len(totals_P)))
    return totals_P[drawn_RP].sum(axis=1) / counts_P[drawn_RP].sum(axis=1)

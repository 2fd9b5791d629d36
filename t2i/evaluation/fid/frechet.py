"""Fréchet distance between Gaussians, and the Inception Score, with the evaluator's conventions.

As in openai/guided-diffusion, evaluations/evaluator.py: the mean is kept in float32, the covariance
in float64 with N - 1; the Inception Score takes softmax(features @ weight) without the bias, in
consecutive parts of 5,000 images, of which a shorter last one counts like the others. The square
root of the product of covariances is only needed by its trace, which is the sum of the square roots
of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2): no general matrix square root, and no
complex numbers.

Shape legend: N = images, D = features, K = classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from t2i.errors import UserError

SPLIT_SIZE = 5000
_ROWS = 4096  # rows in float64 at once


class Statistics(NamedTuple):
    """Mean float32 [D] and covariance float64 [D, D] of a set of features."""

    mean: Tensor
    covariance: Tensor


def feature_statistics(features_ND: Tensor) -> Statistics:
    """Mean and covariance of features float32 [N, D].

    Raises:
        UserError: fewer than two images.
    """
    count = len(features_ND)
    if count < 2:
        raise UserError(f"statistics need at least 2 images, got {count}")
    parts = features_ND.split(_ROWS)
    mean_D = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=mean_D.device)
    for part in parts:
        centred = part.double() - mean_D
        covariance_DD += centred.T @ centred
    return Statistics(mean_D.float(), covariance_DD / (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64; singular covariances are fine.

    Raises:
        UserError: statistics of different widths, or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the statistics have {len(a.mean)} and {len(b.mean)} features; are they from the same network?"
        )
    if not all(bool(value.isfinite().all()) for value in (*a, *b)):
        raise UserError("the statistics hold values that are not finite")
    difference = a.mean.double() - b.mean.double()
    root = _symmetric_root(a.covariance)
    product = root @ b.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = eigenvalues.clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float(difference.dot(difference) + traces - 2 * trace_of_root)


def _symmetric_root(covariance_DD: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance_DD)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # rounding makes zeros negative


def class_probabilities(features_ND: Tensor, weight_KD: Tensor) -> Tensor:
    """softmax(features @ weight^T), float32 [N, K]: the bias of the layer is left out, as the
    evaluator does.
    """
    return torch.cat([(part @ weight_KD.T).softmax(1) for part in features_ND.split(_ROWS)])


class InceptionScore(NamedTuple):
    """Mean over the parts, and their standard deviation (None for a single part)."""

    mean: float
    deviation: float | None


def inception_score(probabilities_NK: Tensor, split_size: int = SPLIT_SIZE) -> InceptionScore:
    """exp(mean KL(p(class | image) || p(class))) of consecutive parts of `split_size` images.

    Order matters: a part of a set that is sorted by class holds few classes, and scores low.
    """
    scores = []
    for part in probabilities_NK.split(split_size):
        p_NK = part.double()
        kl_NK = torch.xlogy(p_NK, p_NK) - torch.xlogy(p_NK, p_NK.mean(0))
        scores.append(kl_NK.sum(1).mean().exp())
    scores = torch.stack(scores)
    return InceptionScore(float(scores.mean()), float(scores.std()) if len(scores) > 1 else None)

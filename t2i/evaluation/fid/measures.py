"""Scores computed from two sets of features, with the conventions of ADM's evaluator.

As in openai/guided-diffusion, evaluations/evaluator.py:

- Fréchet distance: the mean is kept in float32, the covariance in float64 with N - 1. Only the
  trace of the square root of the product of covariances is needed. It is the sum of the square
  roots of the eigenvalues of the symmetric matrix S1^(1/2) S2 S1^(1/2), so no general matrix square
  root and no complex numbers are involved.
- Inception Score: softmax(features @ weight) without the bias, in consecutive parts of 5,000
  images; a shorter last part counts like the others.
- Precision and recall (Kynkäänniemi et al., NeurIPS 2019): every image has a ball around it whose
  radius is the distance to its third neighbor. Precision is the share of samples that lie in a
  reference's ball, recall the share of references that lie in a sample's ball. The evaluator
  computes squared distances in half precision, in blocks of 10,000 x 10,000 images, and repeats a
  block in single precision if anything in it overflows. That shifts the scores by about 0.001, so
  it is reproduced here: every operation is rounded to half precision, with products summed in
  single precision as on GPUs.

Shape legend: N, M = images of either set, D = features, K = classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from t2i.errors import UserError

SPLIT_SIZE = 5000
_ROWS = 4096  # rows converted to float64 at once
NEIGHBOUR = 3
_BLOCK = 10_000  # images; part of the definition, because overflow is detected per block

Distances = Callable[[Tensor, Tensor], Tensor]


class Statistics(NamedTuple):
    """Mean float32 [D] (of any type if read from a file) and covariance float64 [D, D]."""

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
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64, never below 0 through rounding;
    covariances may be singular.

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
    # In this argument order, `max` keeps NaN, the result of numbers that are too large.
    return max(float(difference.dot(difference) + traces - 2 * trace_of_root), 0.0)


def _symmetric_root(covariance_DD: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance_DD)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # rounding makes zeros negative


def class_probabilities(features_ND: Tensor, weight_KD: Tensor) -> Tensor:
    """softmax(features @ weight^T), float32 [N, K], without the bias, as in the evaluator."""
    return torch.cat([(part @ weight_KD.T).softmax(1) for part in features_ND.split(_ROWS)])


class InceptionScore(NamedTuple):
    """The mean over the parts, and their standard deviation (None for a single part)."""

    mean: float
    deviation: float | None


def inception_score(probabilities_NK: Tensor, split_size: int = SPLIT_SIZE) -> InceptionScore:
    """exp(mean KL(p(class | image) || p(class))) of consecutive parts of `split_size` images.

    Order matters: if the images are sorted by class, a part holds few classes and scores low.
    """
    parts = []
    for part in probabilities_NK.split(split_size):
        p_NK = part.double()
        kl_NK = torch.xlogy(p_NK, p_NK) - torch.xlogy(p_NK, p_NK.mean(0))
        parts.append(kl_NK.sum(1).mean().exp())
    scores = torch.stack(parts)
    return InceptionScore(float(scores.mean()), float(scores.std()) if len(scores) > 1 else None)


# -- precision and recall --------------------------------------------------------------------------
@dataclass(frozen=True)
class Manifold:
    """Each image's squared radius (float32), and whether it lies in a ball of the other set."""

    reference_radii: Tensor
    sample_radii: Tensor
    reference_inside: Tensor
    sample_inside: Tensor

    @property
    def precision(self) -> float:
        return float(self.sample_inside.double().mean())

    @property
    def recall(self) -> float:
        return float(self.reference_inside.double().mean())


def half_distances(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """Squared distances float16 [N, M], rounded after every operation; may overflow."""
    u, v = u_ND.half().float(), v_MD.half().float()
    norm_u, norm_v = (
        u.square().half().float().sum(1).half(),
        v.square().half().float().sum(1).half(),
    )
    product_NM = (u @ v.T).half()
    return (norm_u[:, None] - 2 * product_NM + norm_v).clamp_min(0)


def full_distances(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """Squared distances [N, M] in the precision of the features."""
    norm_u, norm_v = u_ND.square().sum(1), v_MD.square().sum(1)
    return (norm_u[:, None] - 2 * (u_ND @ v_MD.T) + norm_v).clamp_min(0)


def official_distances(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """Squared distances float32 [N, M] of a block; half precision, or single if that overflows."""
    distances = half_distances(u_ND, v_MD)
    return distances.float() if distances.isfinite().all() else full_distances(u_ND, v_MD)


def squared_radii(features_ND: Tensor, distances: Distances, neighbour: int) -> Tensor:
    """Squared distance [N] of every image to its neighbor of this number in the same set.

    Raises:
        UserError: the set is too small to have such a neighbor.
    """
    if len(features_ND) <= neighbour:
        raise UserError(
            f"precision and recall need more than {neighbour} images in each set, got {len(features_ND)}"
        )
    radii = []
    for rows in features_ND.split(_BLOCK):
        nearest = []
        for columns in features_ND.split(_BLOCK):
            block = distances(rows, columns)
            nearest.append(block.topk(min(neighbour + 1, len(columns)), largest=False).values)
        # The nearest of all is the image itself.
        radii.append(torch.cat(nearest, 1).topk(neighbour + 1, largest=False).values[:, -1])
    return torch.cat(radii)


def compare_manifolds(
    reference_ND: Tensor,
    samples_MD: Tensor,
    distances: Distances = official_distances,
    neighbour: int = NEIGHBOUR,
) -> Manifold:
    """Precision and recall of sample features [M, D] against reference features [N, D]."""
    reference_radii = squared_radii(reference_ND, distances, neighbour)
    sample_radii = squared_radii(samples_MD, distances, neighbour)
    reference_inside = torch.zeros(len(reference_ND), dtype=torch.bool, device=reference_ND.device)
    sample_inside = torch.zeros(len(samples_MD), dtype=torch.bool, device=samples_MD.device)
    for i in range(0, len(reference_ND), _BLOCK):
        rows = slice(i, i + _BLOCK)
        for j in range(0, len(samples_MD), _BLOCK):
            columns = slice(j, j + _BLOCK)
            block = distances(reference_ND[rows], samples_MD[columns])
            sample_inside[columns] |= (block <= reference_radii[rows, None]).any(0)
            reference_inside[rows] |= (block <= sample_radii[columns]).any(1)
    return Manifold(reference_radii, sample_radii, reference_inside, sample_inside)

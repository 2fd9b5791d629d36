"""Precision and recall of generated images (Kynkäänniemi et al., NeurIPS 2019), with the numerics
of ADM's evaluator.

Every image has a ball around it whose radius is the distance to its third neighbour. Precision is
the share of samples that lie in a reference's ball, recall the share of references that lie in a
sample's ball.

The evaluator computes squared distances in half precision, in blocks of 10,000 x 10,000 images, and
repeats a block in single precision if anything in it overflows. That shifts the scores by about
0.001, so it is done here, too: every operation is rounded to half precision, with products summed
in single precision as GPUs do.

Shape legend: N, M = images of either set, D = features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i.errors import UserError

NEIGHBOUR = 3
_BLOCK = 10_000  # images; a part of the definition, since overflow is decided by block

Distances = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Manifold:
    """The outcome, image by image: squared radii float32, and whether an image lies in a ball of
    the other set.
    """

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
    """Squared distances float16 [N, M], rounded to half precision after every operation; may
    overflow.
    """
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
    """Squared distances float32 [N, M] of one block: half precision, or single if a value is not
    finite in half.
    """
    distances = half_distances(u_ND, v_MD)
    return distances.float() if distances.isfinite().all() else full_distances(u_ND, v_MD)


def squared_radii(
    features_ND: Tensor, distances: Distances = official_distances, neighbour: int = NEIGHBOUR
) -> Tensor:
    """Squared distance [N] of every image to its third (or other) neighbour among the others.

    Raises:
        UserError: a set that has no such neighbour.
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
        # The smallest of all is the image itself.
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

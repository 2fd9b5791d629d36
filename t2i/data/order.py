"""The data order, without state: the sample at a position of a run depends on the position alone.

Position p of a run is sample permutation(seed, p // n)[p % n], and step s covers batch_size
positions from s * batch_size on. So resuming means starting at step s, every world size sees the
same batches in the same order, and no sample is ever dropped: a batch may reach into the next
epoch.
"""

from functools import lru_cache

import torch
from torch import Tensor

from t2i.errors import UserError
from t2i.rng import integers, make_keys

_SPLIT_EPOCH = -1  # key of the held-out split; no epoch uses it


def sample_index(position: int, n: int, seed: int) -> int:
    """The sample at a position of the run: each epoch of n positions visits every sample once."""
    return int(_permutation(n, seed, position // n)[position % n])


def split_indices(
    n: int, n_validation: int, seed: int, images: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A fixed held-out split: sorted int64 indices of the training and of the validation samples.

    Args:
        images: int64 [n], equal for samples of the same image. These are held out together, so
            that no held-out image is trained on; `n_validation` is then the minimum number of
            held-out samples.
    """
    if not 0 <= n_validation < n:
        raise UserError(f"cannot hold out {n_validation} of {n} samples and train on the rest")
    order = _permutation(n, seed, _SPLIT_EPOCH)
    rank = torch.empty(n, dtype=torch.long)
    rank[order] = torch.arange(n)
    if images is not None:  # an image ranks with the first of its samples
        found, image = images.unique(return_inverse=True)
        rank = torch.full((len(found),), n).scatter_reduce(0, image, rank, "amin")[image]
    end = rank.sort().values[n_validation - 1] if n_validation else -1
    held_out = rank <= end
    if held_out.all():
        raise UserError(
            f"cannot hold out {n_validation} of {n} samples and train on the rest: they show only "
            f"{len(found)} different images, and the samples of one image are held out together"
        )
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


@lru_cache(maxsize=4)  # a batch touches at most two epochs; held-out sets use it too
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return integers(make_keys(seed, epoch), 1 << 62, n).argsort(stable=True)

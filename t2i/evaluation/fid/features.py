"""From sets of images to what the scores are computed of: features by the network, and their
statistics.

An .npz may bring its statistics along, as the official reference does: `mu` and `sigma` of the
pooled features, `mu_s` and `sigma_s` of the spatial ones. Then those count, and its images only
serve the scores that compare image by image.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from t2i.errors import UserError
from t2i.evaluation.fid.frechet import Statistics, feature_statistics
from t2i.evaluation.fid.image_sets import ImageSet, npz_arrays, open_images, read_npz_array
from t2i.evaluation.fid.inception import (
    POOL_WIDTH,
    SPATIAL_WIDTH,
    Inception,
    InceptionFeatures,
    extract,
)
from t2i.progress import progress_bar
from t2i.published import remembered_sha256


class Measured(NamedTuple):
    """One side of a comparison; None for what a file of statistics alone does not give."""

    pool: Statistics
    spatial: Statistics | None
    features: Tensor | None
    """Pooled features float32 [N, 2048], in the order of the set."""
    about: dict
    """Where it came from, how many images it has, and hashes."""


def measure(
    path: str | Path,
    network: Inception,
    *,
    batch_size: int,
    description: str,
    progress: bool = True,
) -> Measured:
    """Features and statistics of an .npz file or a folder of images, on the network's device.

    Raises:
        UserError: neither images nor statistics of this network in it; an unreadable image, which
            is named.
    """
    path = Path(path)
    device = network.fc.weight.device
    stored = _stored_statistics(path, device) if has_statistics(path) else None
    about = {"path": str(path), "kind": "npz" if path.is_file() else "folder", "images": 0}
    if stored is not None and "arr_0" not in npz_arrays(path):
        about |= {"statistics": "stored in the file", "sha256": remembered_sha256(path)}
        return Measured(*stored, None, about)

    images = open_images(path)
    features, pixels_sha256 = _extract_all(images, network, batch_size, description, progress)
    about |= {"images": images.count, "left_out": images.left_out, "pixels_sha256": pixels_sha256}
    about["statistics"] = "computed from the images" if stored is None else "stored in the file"
    if stored is not None:  # the pixels' hash does not cover them
        about["sha256"] = remembered_sha256(path)
    pool, spatial = stored or map(feature_statistics, features)
    return Measured(pool, spatial, features.pool, about)


def _extract_all(
    images: ImageSet, network: Inception, batch_size: int, description: str, progress: bool
) -> tuple[InceptionFeatures, str]:
    """Features of all images, and the SHA-256 of their sizes and pixels in order."""
    device = network.fc.weight.device
    pool = torch.empty(images.count, POOL_WIDTH, device=device)
    spatial = torch.empty(images.count, SPATIAL_WIDTH, device=device)
    digest = hashlib.sha256()
    done = 0
    with progress_bar(
        total=images.count, desc=description, unit=" images", disable=not progress
    ) as bar:
        for batch in images.batches(batch_size):
            for image in batch:
                digest.update(str(image.shape).encode() + image.tobytes())
            part = slice(done, done + len(batch))
            pool[part], spatial[part] = extract(network, batch)
            done += len(batch)
            bar.update(len(batch))
    assert done == images.count, (done, images.count)
    return InceptionFeatures(pool, spatial), digest.hexdigest()


def has_statistics(path: str | Path) -> bool:
    """Whether this is an .npz with statistics in it."""
    path = Path(path)
    return path.is_file() and "mu" in npz_arrays(path)


def _stored_statistics(path: Path, device: torch.device) -> tuple[Statistics, Statistics | None]:
    pool = read_statistics(path, "mu", "sigma", device)
    if len(pool.mean) != POOL_WIDTH:
        raise UserError(
            f"{path}: mu has {len(pool.mean)} features, this network has {POOL_WIDTH}; they are of another network"
        )
    spatial = (
        read_statistics(path, "mu_s", "sigma_s", device) if "mu_s" in npz_arrays(path) else None
    )
    return pool, spatial


def read_statistics(
    path: Path, mean: str, covariance: str, device: torch.device | str = "cpu"
) -> Statistics:
    """Statistics stored in an .npz under these two names.

    Raises:
        UserError: one of them is missing, or they do not belong together.
    """
    mean_D, covariance_DD = (
        torch.from_numpy(read_npz_array(path, name)).to(device) for name in (mean, covariance)
    )
    if mean_D.dim() != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise UserError(
            f"{path}: {mean} is {list(mean_D.shape)} and {covariance} is {list(covariance_DD.shape)}; "
            "expected [D] and [D, D]"
        )
    return Statistics(mean_D.float(), covariance_DD.double())

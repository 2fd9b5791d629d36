"""FID, sFID, Inception Score, precision and recall of a set of images, as OpenAI's ADM evaluator
computes them.

These are the numbers that papers report for class-conditional ImageNet at 256 pixels: 50,000
samples against `VIRTUAL_imagenet256_labeled.npz`. FID and sFID use its stored statistics (of the
whole training set), precision and recall its 10,000 images. Any other .npz or folder of images can
be the reference; its statistics are then computed from its images. All scores depend on the number
of samples, so scores of fewer images must be requested explicitly, and are marked.

    network, digest = load_inception()
    results = score_images("samples.npz", "VIRTUAL_imagenet256_labeled.npz", network, digest)

Like the official reference, an .npz may contain statistics: `mu` and `sigma` of the pooled
features, `mu_s` and `sigma_s` of the spatial ones. They are then used instead of computed ones, and
its images serve only the scores that compare image by image.

The Inception Score depends on the order of the images. An .npz is scored in file order, as the
evaluator does; a folder, whose paths are often sorted by class, is shuffled with a fixed seed. The
results hold both scores.
"""

import hashlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2i.errors import UserError
from t2i.evaluation.fid.image_sets import ImageSet, npz_arrays, open_images, read_npz_array
from t2i.evaluation.fid.inception import (
    POOL_WIDTH,
    RANDOM,
    SPATIAL_WIDTH,
    Inception,
    InceptionFeatures,
    extract,
)
from t2i.evaluation.fid.measures import (
    NEIGHBOUR,
    SPLIT_SIZE,
    Statistics,
    class_probabilities,
    compare_manifolds,
    feature_statistics,
    frechet_distance,
    inception_score,
)
from t2i.evaluation.results import markdown_table, versions, warn_of_copies
from t2i.files import file_sha256, read_json
from t2i.progress import progress_bar
from t2i.rng import integers, make_keys
from t2i.sampling import check_counts
from t2i.sources import absolute, check_place

log = logging.getLogger(__name__)

PROTOCOL_IMAGES = 50_000
_SETS = ("samples", "reference")
_SORTED_BELOW = 0.9
"""Share of the shuffled score below which images seem sorted; chance moves it by about 0.01."""


# -- features --------------------------------------------------------------------------------------
class MeasuredSet(NamedTuple):
    """One side of a comparison; None for what a file with only statistics does not provide."""

    pool: Statistics
    spatial: Statistics | None
    features: Tensor | None
    """Pooled features float32 [N, 2048], in the order of the set."""
    about: dict
    """Where the set came from, how many images it has, and hashes."""


def measure(
    path: str | Path, network: Inception, *, batch_size: int, description: str
) -> MeasuredSet:
    """Features and statistics of an .npz file or a folder of images, on the network's device.

    Raises:
        UserError: it holds neither images nor statistics of this network, or an image is
            unreadable (the message names it).
    """
    path = Path(path)
    device = network.fc.weight.device
    stored = _stored_statistics(path, device) if has_statistics(path) else None
    kind = "npz" if path.is_file() else "folder"
    about = {"path": str(absolute(path)), "kind": kind, "images": 0}
    if stored is not None and "arr_0" not in npz_arrays(path):
        about |= {"statistics": "stored in the file", "sha256": file_sha256(path)}
        return MeasuredSet(*stored, None, about)

    images = open_images(path)
    if images.not_read:
        name, reason = images.not_read[0]
        log.warning(f"{path}: {len(images.not_read)} left out, such as {name} ({reason})")
    about |= {"images": images.count, "left_out": images.left_out}
    features, of_images = _extract_all(images, network, batch_size, description)
    about |= of_images
    about["statistics"] = "computed from the images" if stored is None else "stored in the file"
    if stored is not None:  # the hash of the pixels does not cover stored statistics
        about["sha256"] = file_sha256(path)
    pool, spatial = stored or map(feature_statistics, features)
    return MeasuredSet(pool, spatial, features.pool, about)


def _extract_all(
    images: ImageSet, network: Inception, batch_size: int, description: str
) -> tuple[InceptionFeatures, dict]:
    """Features of all images, and facts about these: "sizes" [width, height], the smallest and the
    largest, or the only one; "distinct", how many differ; and a SHA-256 of all, in order.
    """
    device = network.fc.weight.device
    kind = {"device": device, "dtype": torch.float32}
    pool = torch.empty(images.count, POOL_WIDTH, **kind)
    spatial = torch.empty(images.count, SPATIAL_WIDTH, **kind)
    digest, sizes, distinct = hashlib.sha256(), set[tuple[int, int]](), set[bytes]()
    done = 0
    with progress_bar(total=images.count, desc=description, unit=" images") as bar:
        for batch in images.batches(batch_size):
            for image in batch:
                own = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()
                digest.update(own)
                distinct.add(own)
                sizes.add((image.shape[1], image.shape[0]))
            part = slice(done, done + len(batch))
            pool[part], spatial[part] = extract(network, batch)
            done += len(batch)
            bar.update(len(batch))
    assert done == images.count, (done, images.count)
    ends = [list(size) for size in sorted({min(sizes), max(sizes)})]
    about = {"sizes": ends, "distinct": len(distinct), "pixels_sha256": digest.hexdigest()}
    return InceptionFeatures(pool, spatial), about


def has_statistics(path: str | Path) -> bool:
    """Whether this is an .npz file that contains statistics."""
    path = Path(path)
    return path.is_file() and "mu" in npz_arrays(path)


def _stored_statistics(path: Path, device: torch.device) -> tuple[Statistics, Statistics | None]:
    def stored(mean: str, covariance: str, width: int) -> Statistics:
        found = read_statistics(path, mean, covariance, device)
        if len(found.mean) != width:
            raise UserError(
                f"{path}: {mean} has {len(found.mean)} features, this network has {width}; the "
                "statistics are of another network"
            )
        return found

    pool = stored("mu", "sigma", POOL_WIDTH)
    spatial = "mu_s" in npz_arrays(path)
    return pool, stored("mu_s", "sigma_s", SPATIAL_WIDTH) if spatial else None


def read_statistics(
    path: Path, mean: str, covariance: str, device: torch.device | str = "cpu"
) -> Statistics:
    """Statistics stored in an .npz under these two names.

    Raises:
        UserError: one is missing or not finite, or their shapes do not fit.
    """
    arrays = [read_npz_array(path, name) for name in (mean, covariance)]
    for name, array in zip((mean, covariance), arrays, strict=True):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} must hold finite numbers; its type is {array.dtype}")
    # PyTorch takes neither other machines' byte order nor more than 64 bits.
    kinds = [np.float64 if a.dtype.itemsize > 8 else a.dtype.newbyteorder("=") for a in arrays]
    native = [array.astype(kind) for array, kind in zip(arrays, kinds, strict=True)]
    mean_D, covariance_DD = (torch.from_numpy(array).to(device) for array in native)
    if mean_D.dim() != 1 or not len(mean_D) or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise UserError(
            f"{path}: {mean} is {list(mean_D.shape)} and {covariance} is {list(covariance_DD.shape)}; "
            "expected [D] and [D, D]"
        )
    covariance_DD = covariance_DD.double()
    skew = (covariance_DD - covariance_DD.T).abs().max()
    if skew > 1e-3 * covariance_DD.abs().max() or covariance_DD.diagonal().min() < 0:
        raise UserError(
            f"{path}: {covariance} is no covariance: it must be symmetric, and not negative on its "
            "diagonal"
        )
    return Statistics(mean_D, covariance_DD)


# -- scores ----------------------------------------------------------------------------------------
def score_images(
    samples: str | Path,
    reference: str | Path,
    network: Inception,
    weights_hash: str,
    *,
    batch_size: int = 64,
    allow_fewer: bool = False,
) -> dict:
    """All five scores of the samples (an .npz or a folder), as the content of a self-describing
    results file.

    Args:
        reference: an .npz with images, statistics or both, or a folder of images. Scores for which
            it lacks data are None.
        network, weights_hash: as `load_inception` returns them.
        batch_size: images at once; affects nothing but rounding.
        allow_fewer: score fewer than 50,000 samples, with the status PARTIAL.

    Raises:
        UserError: see `check_inputs`; statistics of another network; an unreadable image (named).
    """
    check_counts(batch_size=batch_size)
    images = check_inputs(samples, reference, allow_fewer=allow_fewer)
    # The samples come first: they are newer than a reference, and more often damaged.
    measured, against = (
        measure(path, network, batch_size=batch_size, description=name)
        for path, name in ((samples, "samples"), (reference, "reference"))
    )
    assert measured.features is not None, "a set of images has features"
    _warn_of_sizes(measured.about["sizes"], against.about.get("sizes"))
    if measured.about["pixels_sha256"] == against.about.get("pixels_sha256"):
        log.warning(f"{samples} and {reference} hold the same images, so these scores say nothing")
    warn_of_copies(images.count - measured.about["distinct"], images.count)
    by_order = _inception_scores(measured.features, network.fc.weight)
    order = "file" if images.kind == "npz" else "shuffled"
    scores = {"inception_score": by_order[order]["mean"], **_compare(measured, against)}
    if by_order["file"]["mean"] < _SORTED_BELOW * by_order["shuffled"]["mean"]:
        log.warning(
            f"the Inception Score is {by_order['file']['mean']:.2f} in the order of {samples} and "
            f"{by_order['shuffled']['mean']:.2f} when shuffled: the images seem sorted by class"
        )
    return {
        "benchmark": "FID (ADM)",
        "status": _status(images.count, weights_hash),
        "n": images.count,
        "scores": scores,
        "inception_score": {"reported_order": order, **by_order},
        "samples": measured.about,
        "reference": against.about,
        "network": {"name": "Inception 2015-12-05", "sha256": weights_hash},
        "settings": {
            "protocol_images": PROTOCOL_IMAGES,
            "split_size": SPLIT_SIZE,
            "neighbour": NEIGHBOUR,
            "batch_size": batch_size,
            "device": network.fc.weight.device.type,
        },
        "versions": versions(),
    }


def _warn_of_sizes(samples: list[list[int]], reference: list[list[int]] | None) -> None:
    """Warn if the network sees the two sets in different ways: it makes a square of every image.

    reference: None if only its statistics are known.
    """
    sets = {"samples": samples} | ({} if reference is None else {"reference": reference})
    shown = [
        f"{name} of " + " to ".join(f"{width} x {height}" for width, height in sizes)
        for name, sizes in sets.items()
    ]
    alike = len(samples) == 1 and reference in (None, samples)
    if not alike or samples[0][0] != samples[0][1]:
        log.warning(
            f"{', '.join(shown)} px: every image is stretched to a square of 299 px, so the scores also "
            "measure differences in shape and size; crop and resize both sets alike (ADM's are squares "
            "of 256 px)"
        )


def check_inputs(samples: str | Path, reference: str | Path, *, allow_fewer: bool) -> ImageSet:
    """Open the samples.

    Raises:
        UserError: there are too few, or one of the sets or the reference's statistics is unusable.
    """
    check_place(samples, "samples")
    check_place(reference, "reference")
    images = open_images(samples)
    if images.count < PROTOCOL_IMAGES and not allow_fewer:
        raise UserError(
            f"{samples} holds {images.count:,} images, the protocol has {PROTOCOL_IMAGES:,}, and "
            "the scores depend on the number; draw more, or give --allow-fewer for scores that are "
            "marked PARTIAL"
        )
    sets, least = [images], 2
    if not has_statistics(reference) or "arr_0" in npz_arrays(Path(reference)):
        sets, least = [images, open_images(reference)], NEIGHBOUR + 1
    for one in sets:
        if one.count < least:
            raise UserError(
                f"{one.path} holds {one.count} images; these scores need at least {least}"
            )
    if has_statistics(reference):
        _stored_statistics(Path(reference), torch.device("cpu"))
    return images


def refuse_other_scores(out: Path, samples: Path, reference: Path) -> None:
    """UserError if a file to be written holds anything but scores of the same two sets."""
    if not out.exists():
        return
    before = None
    with suppress(UserError):  # not JSON, such as the samples themselves
        before = read_json(out)
    parts = [before.get(name) if isinstance(before, dict) else None for name in _SETS]
    there = [str(part.get("path") or "") if isinstance(part, dict) else "" for part in parts]
    if not all(there) or [*map(absolute, there)] != [absolute(samples), absolute(reference)]:
        what = (
            f"the scores of {there[0]} against {there[1]}"
            if all(there)
            else "something other than scores"
        )
        raise UserError(f"{out} holds {what}; give another --out, or delete it")


def table(results: dict) -> str:
    """The scores as a markdown table, with the status unless it is "complete"."""
    names = {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "IS",
        "precision": "precision",
        "recall": "recall",
    }
    values = [results["scores"][name] for name in names]
    cells = ["-" if value is None else f"{value:.4f}" for value in values]
    text = markdown_table(["images", *names.values()], [[f"{results['n']:,}", *cells]])
    return text if results["status"] == "complete" else f"{text}\n\n{results['status']}"


def _compare(samples: MeasuredSet, reference: MeasuredSet) -> dict[str, float | None]:
    scores = dict.fromkeys(("fid", "sfid", "precision", "recall"))
    scores["fid"] = frechet_distance(samples.pool, reference.pool)
    if samples.spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if reference.features is not None and samples.features is not None:
        manifold = compare_manifolds(reference.features, samples.features)
        scores |= {"precision": manifold.precision, "recall": manifold.recall}
    return scores


def _inception_scores(features: Tensor, weight: Tensor) -> dict[str, dict]:
    probabilities = class_probabilities(features, weight)
    shuffled = integers(make_keys(0), 1 << 62, len(features)).argsort(stable=True)
    return {
        "file": inception_score(probabilities)._asdict(),
        "shuffled": inception_score(probabilities[shuffled.to(features.device)])._asdict(),
    }


def _status(count: int, weights_hash: str) -> str:
    """ "complete", or why these numbers must not be compared with published ones."""
    parts = []
    if count != PROTOCOL_IMAGES:
        kind = "PARTIAL" if count < PROTOCOL_IMAGES else "OTHER PROTOCOL"
        parts.append(f"{kind}: {count:,} images instead of {PROTOCOL_IMAGES:,}")
    if weights_hash == RANDOM:
        parts.append("RANDOM WEIGHTS: comparable among themselves only")
    return "; ".join(parts) or "complete"

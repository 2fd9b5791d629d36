"""FID, sFID, Inception Score, precision and recall of a set of images, as OpenAI's ADM evaluator
computes them.

The numbers that papers print for class-conditional ImageNet at 256 pixels: 50,000 samples against
`VIRTUAL_imagenet256_labeled.npz`, whose stored statistics (of the whole training set) serve FID and
sFID, and whose 10,000 images precision and recall. Any other .npz or folder of images can be the
reference; then the statistics are those of its images. All scores depend on the number of samples,
so those of fewer images are marked and have to be asked for.

    network, digest = load_inception()
    results = score_images("samples.npz", "VIRTUAL_imagenet256_labeled.npz", network, digest)

The Inception Score depends on the order of the images. An .npz is scored in the order of the file,
as the evaluator does; a folder, whose paths often are in the order of the classes, is shuffled with
a fixed seed. The results hold both.
"""

import logging
from pathlib import Path

from torch import Tensor

from t2i.errors import UserError
from t2i.evaluation.fid.features import Measured, has_statistics, measure
from t2i.evaluation.fid.frechet import (
    SPLIT_SIZE,
    class_probabilities,
    frechet_distance,
    inception_score,
)
from t2i.evaluation.fid.image_sets import ImageSet, open_images
from t2i.evaluation.fid.inception import Inception
from t2i.evaluation.fid.inception_weights import RANDOM
from t2i.evaluation.fid.manifold import NEIGHBOUR, compare_manifolds
from t2i.evaluation.results import versions
from t2i.rng import integers, make_keys

log = logging.getLogger(__name__)

PROTOCOL_IMAGES = 50_000
_SORTED_BELOW = (
    0.9  # of the shuffled score; chance alone moves parts of 5,000 images by a hundredth
)


def score_images(
    samples: str | Path,
    reference: str | Path,
    network: Inception,
    weights_hash: str,
    *,
    batch_size: int = 64,
    allow_fewer: bool = False,
    progress: bool = True,
) -> dict:
    """All five scores of the samples (an .npz or a folder), as the content of a results file that
    explains itself.

    Args:
        reference: an .npz with images, statistics or both, or a folder of images. Scores that it
            cannot give are None.
        network, weights_hash: as `load_inception` returns them.
        batch_size: images at once; another size changes rounding, and nothing else.
        allow_fewer: score fewer than 50,000 samples, under the status PARTIAL.

    Raises:
        UserError: as `check_inputs`; statistics of another network; an unreadable image, by name.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    images = check_inputs(samples, reference, allow_fewer=allow_fewer)
    options = {"batch_size": batch_size, "progress": progress}
    against = measure(reference, network, description="reference", **options)
    measured = measure(samples, network, description="samples", **options)
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


def check_inputs(samples: str | Path, reference: str | Path, *, allow_fewer: bool) -> ImageSet:
    """The samples, opened; UserError if they are too few, or if one of the two sets cannot be used.
    Computes nothing.
    """
    images = open_images(samples)
    if images.count < PROTOCOL_IMAGES and not allow_fewer:
        raise UserError(
            f"{samples} holds {images.count:,} images, the protocol has {PROTOCOL_IMAGES:,}, and the scores depend on that; "
            "make more, or give --allow-fewer for scores that are marked PARTIAL"
        )
    if not has_statistics(reference):
        open_images(reference)
    return images


def table(results: dict) -> str:
    """The scores as a markdown table, with the status when it is not the protocol's."""
    names = {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "IS",
        "precision": "precision",
        "recall": "recall",
    }
    values = [results["scores"][name] for name in names]
    cells = ["-" if value is None else f"{value:.4f}" for value in values]
    head = f"| images | {' | '.join(names.values())} |\n|{'---|' * (len(names) + 1)}\n"
    text = f"{head}| {results['n']:,} | {' | '.join(cells)} |"
    return text if results["status"] == "complete" else f"{text}\n\n{results['status']}"


def _compare(samples: Measured, reference: Measured) -> dict[str, float | None]:
    scores = dict.fromkeys(("fid", "sfid", "precision", "recall"))
    scores["fid"] = frechet_distance(samples.pool, reference.pool)
    if samples.spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if reference.features is not None:
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
    """ "complete", or why these numbers must not stand beside published ones."""
    parts = []
    if count != PROTOCOL_IMAGES:
        kind = "PARTIAL" if count < PROTOCOL_IMAGES else "OTHER PROTOCOL"
        parts.append(f"{kind}: {count:,} images instead of {PROTOCOL_IMAGES:,}")
    if weights_hash == RANDOM:
        parts.append("RANDOM WEIGHTS: comparable among themselves only")
    return "; ".join(parts) or "complete"

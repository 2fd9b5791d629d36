"""Examining the models of `long_grid.py`. What they draw gets GenEval's verdicts by the exact
detector, in separate processes, and is compared with true scenes of the same prompts by features of
the image tokenizer. On held-out scenes: the losses, and how drafts compare with final codes.

Shapes: n images, P prompts, F features, B batch, N windows, k slots, V vocabulary.
"""

import random
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from geneval.rules import judge_image
from launch.lab import long_ways
from launch.lab.result_lines import scores
from t2i.evaluation.fid.measures import (
    Statistics,
    compare_manifolds,
    feature_statistics,
    frechet_distance,
    full_distances,
)
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.shapes.caption_bases import every_caption, to_pixels
from t2i.shapes.scenes import arrange, render
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import benchmark_prompts
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows
from t2i.tensorar.windows import Windows
from t2i.training.batches import Batch
from t2i.training.validation import Validation, batch_losses

_AT_ONCE = 32
"""Images that a process judges, or scenes that it draws, per task."""
_POOLED = 2
"""Features are the encoder's channels, averaged over a grid of 2 x 2 parts of the image."""


@dataclass(frozen=True)
class JudgedPrompts:
    """Prompts with true scenes of them; `n` counts images, prompt by prompt."""

    metadata: list[dict]
    """One entry per prompt."""
    entries: list[dict]
    """One entry per image."""
    samples: int
    """Images per prompt."""
    captions_n: Tensor
    """The number of each image's caption in `every_caption`."""
    jobs: tuple[Tensor, Tensor]
    """Prompt index and sample index of each image."""
    truth_nF: Tensor
    """Features of the true scenes."""
    truth: Statistics


def true_scenes(entries: Sequence[dict], first: int) -> np.ndarray:
    """A true scene for each entry, uint8 [n, H, W, 3]; entries are numbered from `first`."""
    scenes = [
        arrange(random.Random(f"shapes truth {first + i}"), entry)
        for i, entry in enumerate(entries)
    ]
    return np.stack([np.asarray(render(scene)) for scene in scenes])


def open_benchmark(
    tokenizer: VQTokenizer, per_task: int, samples: int, pool: Executor
) -> JudgedPrompts:
    """The shapes world's prompts with true scenes, on the tokenizer's device."""
    metadata = benchmark_prompts(0, per_task)
    entries = [entry for entry in metadata for _ in range(samples)]
    starts = range(0, len(entries), _AT_ONCE)
    drawn = list(pool.map(true_scenes, [entries[i : i + _AT_ONCE] for i in starts], starts))
    numbers = {caption: i for i, caption in enumerate(every_caption())}
    truth = features(tokenizer, np.concatenate(drawn))
    jobs = torch.cartesian_prod(torch.arange(len(metadata)), torch.arange(samples)).view(-1, 2)
    return JudgedPrompts(
        metadata=metadata,
        entries=entries,
        samples=samples,
        captions_n=torch.tensor([numbers[e["prompt"]] for e in entries], device=truth.device),
        jobs=(jobs[:, 0], jobs[:, 1]),
        truth_nF=truth,
        truth=feature_statistics(truth),
    )


@torch.no_grad()
def features(tokenizer: VQTokenizer, images_nHWC: np.ndarray) -> Tensor:
    """Features fp32 [n, F] of uint8 images, from the tokenizer's encoder (before the codebook)."""
    device, parts = next(tokenizer.parameters()).device, []
    for i in range(0, len(images_nHWC), 512):
        channels = tokenizer.encoder(to_pixels(images_nHWC[i : i + 512], device))
        parts.append(F.adaptive_avg_pool2d(channels, _POOLED).flatten(1).float())
    return torch.cat(parts)


@dataclass(frozen=True)
class DrawnImages:
    """A model's images for all prompts of a benchmark."""

    windows_nNkS: Tensor
    geometry: Windows
    images: np.ndarray
    """uint8 [n, H, W, 3]"""


@torch.no_grad()
def draw(
    model: TensorAR,
    benchmark: JudgedPrompts,
    prepared: dict[str, Tensor],
    keys: Tensor,
    way: dict,
    batch: int,
) -> DrawnImages:
    """Draw all images, each with its key, in batches of one size.

    prepared: the conditions of every caption.
    way: changes to the model's own sampling settings, and options of `long_ways.draw`.
    """
    extra = {name: way[name] for name in ("noise", "again") if name in way}
    settings = replace(model.sampling, **{n: v for n, v in way.items() if n not in extra})
    geometry, windows, images = drawn_windows(model, settings), [], []
    for rows, captions in zip(keys.split(batch), benchmark.captions_n.split(batch), strict=True):
        conditions = {name: value[captions] for name, value in prepared.items()}
        drawn = long_ways.draw(model, conditions, rows, settings, **extra)
        windows.append(drawn)
        images.append(model.backbone.decode_images(geometry.final_codes(drawn)).cpu().numpy())
    return DrawnImages(torch.cat(windows), geometry, np.concatenate(images))


# -- verdicts --------------------------------------------------------------------------------------
def judged(images: np.ndarray, entries: Sequence[dict]) -> list[bool]:
    """Whether each image shows what its entry asks for."""
    detector = ShapesDetector()
    return [
        judge_image(Image.fromarray(image), entry, detector).correct
        for image, entry in zip(images, entries, strict=True)
    ]


def ask_verdicts(drawing: DrawnImages, benchmark: JudgedPrompts, pool: Executor) -> list[Future]:
    """Have a pool's processes judge the images; `score` reads the answers."""
    entries = benchmark.entries
    return [
        pool.submit(judged, drawing.images[i : i + _AT_ONCE], entries[i : i + _AT_ONCE])
        for i in range(0, len(entries), _AT_ONCE)
    ]


def score(answers: Sequence[Future], benchmark: JudgedPrompts) -> dict:
    """The `scores` of the verdicts; waits for them."""
    verdicts = [verdict for answer in answers for verdict in answer.result()]
    return scores(verdicts, benchmark.metadata, benchmark.samples)


# -- pictures as a whole ---------------------------------------------------------------------------
def likeness(drawing: DrawnImages, benchmark: JudgedPrompts, tokenizer: VQTokenizer) -> dict:
    """Compare drawn images with true ones of the same prompts, by their features.

    distance: Fréchet distance; precision and recall: as in `measures`; spread: mean distance
    between images of the same prompt, as a multiple of that between true ones.
    """
    drawn_nF, each = features(tokenizer, drawing.images), benchmark.samples
    manifold = compare_manifolds(benchmark.truth_nF, drawn_nF, full_distances)
    return {
        "distance": frechet_distance(feature_statistics(drawn_nF), benchmark.truth),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "spread": _spread(drawn_nF, each) / _spread(benchmark.truth_nF, each),
    }


def _spread(features_nF: Tensor, each: int) -> float:
    """Mean distance between two images of the same prompt."""
    if each == 1:
        return 1.0
    groups = features_nF.view(-1, each, features_nF.shape[1])
    return float(torch.cdist(groups, groups).sum((1, 2)).mean() / (each * (each - 1)))


# -- held out --------------------------------------------------------------------------------------
@torch.no_grad()
def held_out(model: TensorAR, batches: Sequence[Batch]) -> dict:
    """The held-out losses by slot, as in `t2i.training.validation`, and `drafts_and_finals`."""
    total, drafts = torch.zeros(2, 2, model.config.k), []
    for batch in batches:
        losses, own = batch_losses(model, batch)
        total += losses
        if model.config.k > 1:
            drafts.append(drafts_and_finals(model, batch, own))
    found: dict = {"losses": Validation(*(total[:, 0] / total[:, 1]).tolist()).metrics()}
    if drafts:
        found["drafts"] = {
            name: torch.stack([part[name] for part in drafts]).mean(0).tolist()
            for name in drafts[0]
        }
    return found


def drafts_and_finals(model: TensorAR, batch: Batch, windows: Tensor) -> dict[str, Tensor]:
    """How predictions for a position in slots 1 .. k-1 compare with its final prediction in slot 0.

    Windows of own drafts are the input, and positions that went through all slots count. For each
    draft slot, [k - 1]: "total_variation" between the two predictions, and "right", how often a
    draft drawn from its prediction is the true code.
    """
    condition, k = model.backbone.encode_condition(batch.prepared), model.config.k
    d_BNkD = model.decode_slots(model.hidden(condition, windows))
    p_BNkV = model.backbone.next_logits(d_BNkD, windows[..., :0]).softmax(-1)
    truth_BN = batch.codes[..., 0]
    final = p_BNkV[:, k:, 0]
    variation, right = [], []
    for j in range(1, k):
        of_draft = p_BNkV[:, k - j : len(truth_BN[0]) - j, j]
        variation.append((of_draft - final).abs().sum(-1).mean() / 2)
        right.append(of_draft.gather(-1, truth_BN[:, k:, None]).mean())
    return {"total_variation": torch.stack(variation), "right": torch.stack(right)}

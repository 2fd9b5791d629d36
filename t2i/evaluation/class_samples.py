"""A class-conditional model's images for FID: labels, codes, pixels, batch by batch
(`sample_writer.py` stores them).

An image depends on its number, the seed and the settings: not on which process draws it, nor on
what was interrupted before. Its class and its codes come from different random streams.

Shapes: B images, H x W pixels.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from t2i.errors import UserError
from t2i.evaluation.sample_writer import sample_labels, write_samples
from t2i.evaluation.sampling import weights_hashes
from t2i.processes import Processes
from t2i.rng import fold, make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows

_CODES = 1  # the class is drawn from the image's key itself


@dataclass(frozen=True)
class ClassSamples:
    """Which images to draw."""

    count: int = 50_000
    labels: Literal["balanced", "random"] = "balanced"
    """As many of every class (as RAR and Open-MAGVIT2 are scored), or each image's class at random
    (as LlamaGen is).
    """
    seed: int = 0
    image_size: int | None = None
    """Side in pixels that images are resized to; the model's own if None."""
    batch_size: int = 64
    """Images per batch; another size changes rounding."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be between 0 and 2**63 - 1")
        for name in ("count", "batch_size", "image_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def draw_class_samples(
    model: TensorAR,
    out: Path,
    options: ClassSamples,
    *,
    sampling: SamplingConfig,
    processes: Processes,
    about: dict | None = None,
    progress: bool = True,
) -> Path:
    """Draw the images that `out` (.npz or a folder) does not hold yet; every process calls it.
    Returns `out` when it is complete.

    Args:
        about: facts about the model that are recorded, but not compared.

    Raises:
        UserError: not a class-conditional model, or `out` holds images of other settings.
        TimeoutError: another process stopped.
    """
    spec = model.backbone.spec
    if spec.cond_kind != "class":
        raise UserError(
            f"this {spec.family} model draws captions, not classes: launch/generate.py samples it"
        )
    side = options.image_size
    size = model.backbone.image_size if side is None else (side, side)
    settings = {
        "family": spec.family,
        "weights": weights_hashes(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "sampling": asdict(sampling),
        "classes": spec.num_classes,
        "labels": options.labels,
        "seed": options.seed,
    }
    return write_samples(
        out,
        options.count,
        size,
        drawer(model, options, sampling, size),
        settings=settings,
        about=about,
        batch_size=options.batch_size,
        processes=processes,
        progress=progress,
    )


def drawer(
    model: TensorAR, options: ClassSamples, sampling: SamplingConfig, size: tuple[int, int]
) -> Callable[[range], np.ndarray]:
    """A function from numbers of images to uint8 [B, H, W, 3]."""
    backbone = model.backbone
    labels = sample_labels(
        options.count,
        backbone.spec.num_classes,
        balanced=options.labels == "balanced",
        seed=options.seed,
    )

    def draw(rows: range) -> np.ndarray:
        numbers = torch.tensor(rows)
        prepared = backbone.prepare(labels[numbers])
        keys = fold(make_keys(options.seed, numbers), _CODES)
        windows = sample_windows(model, prepared, keys, sampling)
        return backbone.decode_images(model.windows.final_codes(windows), size).cpu().numpy()

    return draw

"""The interface of the GenEval judge's detectors, which find objects and name their colors.

Two classes implement it: the shapes world's exact detector (`t2i.shapes.shapes_detector`) and
Mask2Former with CLIP for photographs (`geneval.detectors`).

Shapes: n detections of one class, H x W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from t2i.errors import UserError


@dataclass(frozen=True)
class Detections:
    """The detections of one class, in the detector's own order.

    boxes: float32 [n, 4], pixels (x0, y0, x1, y1); x1 and y1 are one past the last pixel, as in
        mmdet's `mask2bbox`.
    scores: float32 [n] in (0, 1].
    masks: bool [n, H, W], or None if the detector gives no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        # Scores must be float32: a double 0.3 would fall on the other side of the threshold.
        for name in ("boxes", "scores"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        boxes, scores, masks = self.boxes, self.scores, self.masks
        if scores.ndim != 1 or boxes.size != 4 * len(scores):
            raise UserError(
                f"boxes are {list(boxes.shape)} and scores {list(scores.shape)}: expected [n, 4] and "
                "[n]"
            )
        object.__setattr__(self, "boxes", boxes.reshape(-1, 4))
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError("a detection's box or score is not finite")
        if masks is None:
            return
        fit = isinstance(masks, np.ndarray) and masks.dtype == bool
        if not fit or masks.ndim != 3 or len(masks) != len(scores):
            raise UserError(f"masks must be an array of bool [{len(scores)}, H, W], or None")

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, indices: Sequence[int]) -> Detections:
        """The detections at `indices`, in that order."""
        chosen = list(indices)
        masks = None if self.masks is None else self.masks[chosen]
        return Detections(self.boxes[chosen], self.scores[chosen], masks)


class Detector(Protocol):
    """Finds objects and names their colors."""

    @property
    def classes(self) -> Sequence[str]:
        """The class names that `detect` can return."""
        ...

    @property
    def colors(self) -> Sequence[str]:
        """The color names that `classify_colors` can return."""
        ...

    def detect(self, image: Image.Image) -> Mapping[str, Detections]:
        """Class name -> detections; classes without detections may be missing."""
        ...

    def classify_colors(
        self, image: Image.Image, class_name: str, detections: Detections
    ) -> list[str]:
        """One of GenEval's color names for each detection."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the results file says about the judge: name, whether it is the official one
        ("official"), weights (file name -> SHA-256) and library versions. JSON types only."""
        ...

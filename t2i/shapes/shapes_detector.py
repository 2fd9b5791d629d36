"""An analytic detector for the shapes world, with the same interface as GenEval's Mask2Former.

It inverts the renderer of `t2i.shapes.scenes`: it finds the palette color of each pixel and how
much of the pixel it covers, then connected regions of one color, and for each region the shape
whose template (the renderer's own mask, shifted by a pixel and resized by a few) overlaps it best.
The best intersection over union, passed through a logistic curve, is the score. Clean, slightly
blurred or slightly noisy shapes score near 1; broken or merged ones stay below GenEval's
thresholds.

Shapes: H x W image, K palette colors, C shape classes, P template canvas side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from PIL import Image
from scipy import ndimage

from geneval.detector import Detections
from t2i.errors import UserError
from t2i.shapes.scenes import BACKGROUND, PALETTE, UNITS, shape_mask
from t2i.shapes.shapes_prompts import COLORS, SHAPES

# Sides of a region that counts as an object; the world's own objects have 14 to 30 units.
SMALLEST, LARGEST = 9 / UNITS, 40 / UNITS
SECOND_COLOR = 0.2  # a region is split if another color covers this share of it
# score = logistic((IoU - IOU_MIDDLE) / IOU_WIDTH): IoU 0.77 -> 0.3, IoU 0.83 -> 0.9.
IOU_MIDDLE, IOU_WIDTH = 0.79, 0.02
SHIFTS = (-1, 0, 1)  # pixels
# Pixels by which a template is larger than the region: noise adds one to a region's side, blur
# removes one from each end of a thin tip.
GROWTH = (-1, 0, 1, 2)


class ShapesDetector:
    """Finds the shapes world's shapes; see `geneval.detector.Detector` for the interface."""

    classes: Sequence[str] = SHAPES
    colors: Sequence[str] = COLORS

    def detect(self, image: Image.Image | np.ndarray) -> dict[str, Detections]:
        """Shape -> `Detections` (pixel boxes, scores, masks); shapes without any are left out.

        image: RGB, PIL or uint8 [H, W, 3]. Each region becomes one detection, of the shape that
        fits it best.
        """
        pixels = _pixels(image)
        side = min(pixels.shape[:2])
        found: dict[str, list[tuple[list[int], float, np.ndarray]]] = {}
        for region in _color_regions(pixels):
            rows, cols = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
            box = [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]
            extent = max(box[2] - box[0], box[3] - box[1])
            if not SMALLEST * side <= extent <= LARGEST * side:
                continue
            shape, iou = _match(region[box[1] : box[3], box[0] : box[2]])
            score = 1 / (1 + math.exp((IOU_MIDDLE - iou) / IOU_WIDTH))
            found.setdefault(shape, []).append((box, score, region))
        return {
            shape: Detections(*map(np.array, zip(*found[shape], strict=True)))
            for shape in SHAPES
            if shape in found
        }

    def classify_colors(
        self, image: Image.Image | np.ndarray, class_name: str, detections: Detections
    ) -> list[str]:
        """The palette color nearest to the median color inside each detection's mask."""
        pixels = _pixels(image)
        assert detections.masks is not None
        palette = np.array(list(PALETTE.values()), dtype=np.float32)
        names = []
        for mask in detections.masks:
            median = np.median(pixels[mask], axis=0)
            names.append(list(PALETTE)[np.linalg.norm(palette - median, axis=1).argmin()])
        return names

    def identity(self) -> dict[str, object]:
        """Facts for results files: the detector has no weights, and Pillow draws its templates."""
        libraries = {name: version(name) for name in ("numpy", "pillow")}
        return {"name": "shapes", "official": False, "weights": {}, "libraries": libraries}


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """The image as float32 [H, W, 3], 0..255."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"give a PIL image or uint8 [H, W, 3], not {image.dtype} {image.shape}")
    return image.astype(np.float32)


def _color_regions(pixels: np.ndarray) -> list[np.ndarray]:
    """Masks (bool [H, W]) of the connected regions of a single palette color."""
    color, coverage = _unmix(pixels)
    inside = coverage > 0.5
    labels = np.zeros_like(color)  # 0 is background, 1 + k is palette color k
    for blob in _components(inside.astype(int)):
        # A few pixels of a wrong color (edges, noise) must not split a shape: only colors that
        # cover a good part of the blob count, and its other pixels get the most common color.
        part = np.bincount(color[blob], minlength=len(PALETTE)) / blob.sum()
        major = np.flatnonzero(part >= min(SECOND_COLOR, part.max()))
        labels[blob] = 1 + np.where(np.isin(color[blob], major), color[blob], part.argmax())
    return _components(labels)


def _unmix(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as a mix of the background and one palette color.

    Returns the color's index (int [H, W]) and its share (float [H, W], 0..1). A pixel on a red edge
    is found to be half red; the nearest palette color would be pink.
    """
    ground = np.array(BACKGROUND, dtype=np.float32)
    axes_K3 = np.array(list(PALETTE.values()), dtype=np.float32) - ground
    offset = pixels - ground
    share_HWK = np.clip(offset @ axes_K3.T / (axes_K3**2).sum(axis=1), 0, 1)
    rest_HWK = np.linalg.norm(offset[:, :, None] - share_HWK[..., None] * axes_K3, axis=-1)
    color = rest_HWK.argmin(axis=-1)
    return color, np.take_along_axis(share_HWK, color[..., None], axis=-1)[..., 0]


def _components(labels: np.ndarray) -> list[np.ndarray]:
    """Masks of the 8-connected regions of equal non-zero label, in raster order."""
    masks = []
    for label in np.unique(labels[labels > 0]):
        ids, count = ndimage.label(labels == label, structure=np.ones((3, 3)))
        masks += [ids == i for i in range(1, count + 1)]
    return sorted(masks, key=np.argmax)  # by the first pixel


def _match(region: np.ndarray) -> tuple[str, float]:
    """The best-fitting shape for a tightly cropped mask, and its intersection over union."""
    extent = max(region.shape)
    canvas = extent + 2 * (max(GROWTH) + max(SHIFTS))
    placed = np.zeros((canvas, canvas), dtype=np.float32)
    y, x = (canvas - region.shape[0]) // 2, (canvas - region.shape[1]) // 2
    placed[y : y + region.shape[0], x : x + region.shape[1]] = region
    best = np.zeros(len(SHAPES))
    for growth in GROWTH:
        templates = _templates(extent + growth, canvas)
        shared = templates @ placed.ravel()
        union = templates.sum(axis=1) + placed.sum() - shared
        best = np.maximum(best, (shared / union).reshape(len(SHAPES), -1).max(axis=1))
    return SHAPES[best.argmax()], float(best.max())


@lru_cache(maxsize=128)
def _templates(size: int, canvas: int) -> np.ndarray:
    """Every shape at every shift, as float32 rows of 0 and 1 [C * shifts, P * P]."""
    rows = []
    for shape in SHAPES:
        mask = np.asarray(shape_mask(shape, size, size)) > 127
        occupied_y, occupied_x = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        mask = mask[occupied_y[0] : occupied_y[-1] + 1, occupied_x[0] : occupied_x[-1] + 1]
        y, x = (canvas - mask.shape[0]) // 2, (canvas - mask.shape[1]) // 2
        for dy in SHIFTS:
            for dx in SHIFTS:
                row = np.zeros((canvas, canvas), dtype=np.float32)
                row[y + dy : y + dy + mask.shape[0], x + dx : x + dx + mask.shape[1]] = mask
                rows.append(row.ravel())
    return np.stack(rows)

"""GenEval's detector: Mask2Former with the results of mmdet 2.28's `inference_detector`.

The network is transformers' (weights: `geneval.mmdet_weights`). Preprocessing and post-processing
follow mmdet (`Mask2FormerHead`, `MaskFormerFusionHead.instance_postprocess`, `mask2bbox`), not
transformers' processor, which resizes masks by nearest neighbor. In particular:
- the 100 best (query, class) pairs are kept, so one query can be detected as several classes;
- a mask is enlarged twice: to the padded input, then, with the padding cut off, to the image;
- score = class probability x mean probability inside the mask; overlaps are not suppressed.

Images go through mmdet 2.28's test pipeline, on the model's device: they are scaled so that the
long side is at most 1333 and the short side at most 800 pixels, with OpenCV's bilinear resize (no
antialiasing, integer arithmetic); padded on the right and below with gray to a multiple of 32; then
normalized. The resize is bit-exact, because one gray level on a tenth of the pixels is enough to
flip the network's attention masks.

Shapes: Q queries, K classes, D detections, H x W image, h x w padded input, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from geneval.detector import Detections
from geneval.object_names import OBJECT_NAMES
from t2i.errors import UserError
from t2i.imaging import upright_rgb

MAX_DETECTIONS = 100
# The number of masks enlarged at once. It limits memory and does not affect the result.
_QUERIES_AT_ONCE = 10
_FIXED_BITS = 11  # OpenCV's bilinear weights are multiples of 1 / 2048


@dataclass(frozen=True)
class InputRules:
    """Constants of the test pipeline; the defaults are the released model's.

    long_side, short_side: limits in pixels. mean, std: per RGB channel, in 0..255.
    """

    long_side: int = 1333
    short_side: int = 800
    pad_divisor: int = 32
    pad_value: int = 128
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)


class Mask2FormerDetector:
    """Finds GenEval's objects in photographs."""

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        *,
        classes: Sequence[str] = OBJECT_NAMES,
        rules: InputRules | None = None,
        device: torch.device | str = "cpu",
    ):
        """classes: class names in the order of the model's labels.

        Raises:
            UserError: the model has a different number of labels.
        """
        if model.config.num_labels != len(classes):
            raise UserError(
                f"the model has {model.config.num_labels} classes, but GenEval needs "
                f"{len(classes)}: give a model trained on COCO's instances"
            )
        network: Any = model  # transformers' decorator hides the signature of `to`
        self.model = network.to(device).eval()
        self.classes = tuple(classes)
        self.rules = rules or InputRules()
        self.device = torch.device(device)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Detections]:
        """Class -> its detections with masks, for the classes that were found.

        Boxes are in the upright image. Within a class, detections are in descending order of class
        probability. An empty mask has score 0 and box 0, 0, 0, 0.
        """
        upright = upright_rgb(image)
        pixels, unpadded = prepare(upright, self.rules, self.device)
        class_logits_QK, mask_logits_Qhw = self.logits(pixels)
        instances = read_instances(
            class_logits_QK,
            mask_logits_Qhw,
            padded=(pixels.shape[0], pixels.shape[1]),
            unpadded=unpadded,
            original=(upright.height, upright.width),
        )
        labels_D, boxes_D4, scores_D, masks_DHW = (part.cpu() for part in instances)
        found = {}
        for label in labels_D.unique().tolist():
            mine = labels_D == label
            parts = (boxes_D4[mine], scores_D[mine], masks_DHW[mine])
            found[self.classes[label]] = Detections(*(part.numpy() for part in parts))
        return found

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The last decoder layer's class logits [Q, K + 1] and mask logits [Q, h / 4, w / 4].

        pixels: uint8 [h, w, 3], resized and padded.
        """
        output = self.model(normalize(pixels, self.rules))
        return output.class_queries_logits[0], output.masks_queries_logits[0]


def read_instances(
    class_logits_QK: Tensor,
    mask_logits_Qhw: Tensor,
    *,
    padded: tuple[int, int],
    unpadded: tuple[int, int],
    original: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections from logits: labels int64 [D], boxes [D, 4], scores [D], masks bool [D, H, W].

    class_logits_QK: the last class is "no object". Sizes are (height, width).
    """
    probability_QK = class_logits_QK.softmax(-1)[:, :-1]
    best = probability_QK.flatten().topk(min(MAX_DETECTIONS, probability_QK.numel()))
    classes = probability_QK.shape[1]
    query_D, label_D = best.indices // classes, best.indices % classes
    used, place_D = query_D.unique(return_inverse=True)
    quality, boxes, masks = [], [], []
    for part in used.split(_QUERIES_AT_ONCE):
        logits_nHW = _enlarge(mask_logits_Qhw[part], padded, unpadded, original)
        masks_nHW = logits_nHW > 0
        inside_nHW = masks_nHW.float()
        total_n = (logits_nHW.sigmoid() * inside_nHW).flatten(1).sum(1)
        quality.append(total_n / (inside_nHW.flatten(1).sum(1) + 1e-6))
        boxes.append(mask_boxes(masks_nHW))
        masks.append(masks_nHW)
    scores_D = best.values * torch.cat(quality)[place_D]
    return label_D, torch.cat(boxes)[place_D], scores_D, torch.cat(masks)[place_D]


def _enlarge(
    logits_nhw: Tensor,
    padded: tuple[int, int],
    unpadded: tuple[int, int],
    original: tuple[int, int],
) -> Tensor:
    """Mask logits at stride 4, [n, h / 4, w / 4], enlarged to the original image, [n, H, W]."""
    whole = F.interpolate(logits_nhw[None], size=padded, mode="bilinear", align_corners=False)
    seen = whole[..., : unpadded[0], : unpadded[1]]
    return F.interpolate(seen, size=original, mode="bilinear", align_corners=False)[0]


def mask_boxes(masks_nHW: Tensor) -> Tensor:
    """(x0, y0, x1, y1), float32 [n, 4]; x1, y1 are one past the mask; an empty mask gives zeros."""
    edges = []
    for inside_nL in (masks_nHW.any(1), masks_nHW.any(2)):  # columns, rows
        place_L = torch.arange(1, inside_nL.shape[1] + 1, device=inside_nL.device)
        last_n = (inside_nL * place_L).amax(1)
        first_n = (inside_nL * place_L.flip(0)).amax(1)
        edges.append((torch.where(last_n > 0, inside_nL.shape[1] - first_n, 0), last_n))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=1).float()


# -- images ----------------------------------------------------------------------------------------
def scaled_size(width: int, height: int, rules: InputRules) -> tuple[int, int]:
    """Width and height after the resize, which keeps the aspect ratio; halves are rounded up."""
    scale = min(rules.long_side / max(width, height), rules.short_side / min(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def prepare(
    image: Image.Image, rules: InputRules, device: torch.device | str = "cpu"
) -> tuple[Tensor, tuple[int, int]]:
    """Resized and padded pixels, uint8 [h, w, 3], and the (height, width) without the padding.

    image: mode RGB, from `upright_rgb`.
    """
    width, height = scaled_size(*image.size, rules)
    resized = resize_bilinear(torch.from_numpy(np.array(image)).to(device), width, height)
    below, right = -height % rules.pad_divisor, -width % rules.pad_divisor
    return F.pad(resized, (0, 0, 0, right, 0, below), value=rules.pad_value), (height, width)


def normalize(pixels: Tensor, rules: InputRules) -> Tensor:
    """Normalized pixels, float32 [1, 3, h, w], from uint8 [h, w, 3]."""
    mean, std = (torch.tensor(part, device=pixels.device) for part in (rules.mean, rules.std))
    return ((pixels.float() - mean) / std).permute(2, 0, 1)[None].contiguous()


def resize_bilinear(pixels_HWC: Tensor, width: int, height: int) -> Tensor:
    """OpenCV's `resize(..., INTER_LINEAR)` of a uint8 image, bit for bit; uint8 [h, w, C].

    Interpolates horizontally, with 11-bit weights and exact sums, then vertically, where OpenCV
    drops 4 bits before and 16 bits after the product. Beyond the border, the outermost pixel
    repeats.
    """
    (in_height, in_width), device = pixels_HWC.shape[:2], pixels_HWC.device
    if (width, height) == (in_width, in_height):
        return pixels_HWC
    left, right, to_left, to_right = _taps(in_width, width, device, clamp_weights=True)
    top, bottom, to_top, to_bottom = _taps(in_height, height, device, clamp_weights=False)
    source = pixels_HWC.int()
    rows_HwC = (
        source[:, left] * to_left[None, :, None] + source[:, right] * to_right[None, :, None]
    ) >> 4
    upper = (rows_HwC[top] * to_top[:, None, None]) >> 16
    lower = (rows_HwC[bottom] * to_bottom[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).byte()


def _taps(
    size_in: int, size_out: int, device: torch.device, *, clamp_weights: bool
) -> tuple[Tensor, ...]:
    """The two source indices and their integer weights for every output pixel along one axis."""
    centers = (np.arange(size_out, dtype=np.float64) + 0.5) * (size_in / size_out) - 0.5
    centers = centers.astype(np.float32)
    first = np.floor(centers).astype(np.int64)
    share = centers - first.astype(np.float32)
    if clamp_weights:
        share[(first < 0) | (first >= size_in - 1)] = 0
    one = np.float32(1 << _FIXED_BITS)
    to_first, to_second = (np.rint(one * part).astype(np.int32) for part in (1 - share, share))
    limits = (0, size_in - 1)
    taps = np.clip(first, *limits), np.clip(first + 1, *limits), to_first, to_second
    return tuple(torch.from_numpy(tap).to(device) for tap in taps)

"""GenEval's detector: Mask2Former as mmdet 2.28's `inference_detector` runs and reads it.

The network is transformers' (weights: `geneval.mmdet_weights`), preprocessing and post-processing
follow mmdet (`Mask2FormerHead`, `MaskFormerFusionHead.instance_postprocess`, `mask2bbox`), not
transformers' processor, which resizes masks by nearest neighbour. Read in particular:
- the 100 best (query, class) pairs count, so one query can give several classes;
- a mask is enlarged twice: to the padded input, then, without the padding, to the image;
- score = class probability x mean probability inside the mask. There is no suppression.

Shapes: Q queries, K classes, D detections, H x W image, h x w padded input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from geneval.detector import Detections
from geneval.mmdet_images import ImageRules, normalise, prepare, upright_rgb
from geneval.object_names import OBJECT_NAMES
from t2i.errors import UserError

MAX_DETECTIONS = 100
# Masks of this many queries are enlarged at once: a bound on memory, without effect on the result.
_QUERIES_AT_ONCE = 10


class Mask2FormerDetector:
    """Finds GenEval's objects in photographs."""

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        *,
        classes: Sequence[str] = OBJECT_NAMES,
        rules: ImageRules | None = None,
        device: torch.device | str = "cpu",
    ):
        """classes: their names in the order of the model's labels.

        Raises:
            UserError: the model has another number of labels.
        """
        if model.config.num_labels != len(classes):
            raise UserError(
                f"the model tells {model.config.num_labels} classes apart, GenEval needs "
                f"{len(classes)}: give a model for COCO's instances"
            )
        self.model = model.to(device).eval()
        self.classes = tuple(classes)
        self.rules = rules or ImageRules()
        self.device = torch.device(device)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Detections]:
        """Class -> its detections with masks (boxes in the upright image), classes without any left
        out.

        Most probable class first within a class; an empty mask has score 0 and box 0, 0, 0, 0.
        """
        upright = upright_rgb(image)
        pixels, unpadded = prepare(upright, self.rules)
        class_logits_QK, mask_logits_Qhw = self.logits(pixels)
        labels_D, boxes_D4, scores_D, masks_DHW = read_instances(
            class_logits_QK,
            mask_logits_Qhw,
            padded=pixels.shape[:2],
            unpadded=unpadded,
            original=(upright.height, upright.width),
        )
        found = {}
        for label in labels_D.unique().tolist():
            mine = labels_D == label
            parts = (boxes_D4[mine], scores_D[mine], masks_DHW[mine])
            found[self.classes[label]] = Detections(*(part.cpu().numpy() for part in parts))
        return found

    @torch.inference_mode()
    def logits(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The last decoder layer's class logits [Q, K + 1] and mask logits [Q, h / 4, w / 4].

        pixels: uint8 [h, w, 3], resized and padded.
        """
        output = self.model(normalise(pixels, self.rules).to(self.device))
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
    query_D, label_D = (
        best.indices // probability_QK.shape[1],
        best.indices % probability_QK.shape[1],
    )
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
    """Mask logits at stride 4 -> [n, H, W] of the original image."""
    whole = F.interpolate(logits_nhw[None], size=padded, mode="bilinear", align_corners=False)
    seen = whole[..., : unpadded[0], : unpadded[1]]
    return F.interpolate(seen, size=original, mode="bilinear", align_corners=False)[0]


def mask_boxes(masks_nHW: Tensor) -> Tensor:
    """(x0, y0, x1, y1) float32 [n, 4]; x1 and y1 one past the mask; zeros for an empty mask."""
    boxes_n4 = torch.zeros(len(masks_nHW), 4, device=masks_nHW.device)
    for box, mask in zip(boxes_n4, masks_nHW, strict=True):
        columns, rows = mask.any(0).nonzero(), mask.any(1).nonzero()
        if len(columns):
            edges = columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1
            box[:] = torch.stack(edges)
    return boxes_n4

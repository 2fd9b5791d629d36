"""GenEval's color classifier: OpenAI CLIP ViT-L/14 on crops of the detected objects.

Reference: `ImageCrops` and `color_classification` in `evaluation/evaluate_images.py` of
djghosh13/geneval, `zero_shot_classifier` and `run_classification` of clip_benchmark 1.4. Easy to
get wrong, and tested:
- the weights were trained with QuickGELU; open_clip since 2.29 builds "ViT-L-14" with plain GELU;
- gray #999 around the mask, but black outside the image; boxes round half to even;
- CLIP crops the center square, so long objects lose their ends;
- the third text has no class name in it;
- on CUDA, both towers and their product run under float16 autocast, as in the official script.

Shapes: N crops, C colors, T texts per color, D CLIP dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from geneval.detector import Detections
from geneval.rules import COLORS
from t2i.errors import UserError
from t2i.imaging import upright_rgb
from t2i.weights import load_strict

ARCHITECTURE = "ViT-L-14-quickgelu"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"
SIDE = 224
LOGIT_SCALE = 100.0
_CROPS_AT_ONCE = 16
# Entries of OpenAI's archive that are not parameters.
_ARCHIVE_CONSTANTS = ("input_resolution", "context_length", "vocab_size")

# Resizes the shorter side to 224 (bicubic), crops the center square and normalizes: float32
# [3, 224, 224].
clip_pixels = open_clip.image_transform(SIDE, is_train=False)

Tokenizer = Callable[[Sequence[str]], Tensor]


class ColorClassifier:
    """Names the colors of detected objects."""

    colors = COLORS

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer, device: torch.device | str = "cpu"):
        """clip: an open_clip model with QuickGELU; its image size must be `SIDE`.

        Raises:
            UserError: the model has a different activation.
        """
        require_quick_gelu(clip)
        self.clip: Any = clip.to(device).eval()
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def classify(self, image: Image.Image, class_name: str, detections: Detections) -> list[str]:
        """One color for each detection of the class; boxes are in the upright image."""
        if class_name not in self._classifiers:
            self._classifiers[class_name] = self._classifier(class_name)
        crops = object_crops(image, detections)
        colors = []
        for start in range(0, len(crops), _CROPS_AT_ONCE):
            batch = [clip_pixels(crop) for crop in crops[start : start + _CROPS_AT_ONCE]]
            with self._autocast():
                embeddings_ND = self.clip.encode_image(torch.stack(batch).to(self.device))
                logits_NC = color_logits(embeddings_ND, self._classifiers[class_name])
            colors += [COLORS[i] for i in first_largest(logits_NC)]
        return colors

    def _classifier(self, name: str) -> Tensor:
        texts = color_texts(name)
        tokens = self.tokenizer([text for group in texts for text in group]).to(self.device)
        with self._autocast():
            embeddings = self.clip.encode_text(tokens)
            return class_embeddings(embeddings.unflatten(0, (len(COLORS), len(TEMPLATES))))

    @property
    def precision(self) -> str:
        """The number format of the towers' computations; it can change close decisions."""
        return "float16 autocast" if self.device.type == "cuda" else "float32"

    def _autocast(self) -> AbstractContextManager:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.float16)
        return nullcontext()


def load_clip(path: Path, architecture: str = ARCHITECTURE) -> nn.Module:
    """OpenAI's ViT-L/14 in open_clip, float32, from ViT-L-14.pt. The caller checks the file's hash.

    Raises:
        UserError: the file is not a TorchScript archive, or its weights do not fit.
    """
    clip = open_clip.CLIP(**open_clip.get_model_config(architecture))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated; the published file needs it
            archive = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is not OpenAI's archive of CLIP: {reason}") from error
    state_dict = {k: v for k, v in archive.state_dict().items() if k not in _ARCHIVE_CONSTANTS}
    load_strict(clip, state_dict, path)
    return clip


def load_tokenizer() -> Tokenizer:
    """CLIP's tokenizer; its vocabulary comes with open_clip."""
    return open_clip.get_tokenizer(ARCHITECTURE)


def require_quick_gelu(clip: nn.Module) -> None:
    """UserError unless every MLP of both towers has QuickGELU."""
    activations = {
        type(module.gelu).__name__ for module in clip.modules() if hasattr(module, "gelu")
    }
    if activations != {"QuickGELU"}:
        raise UserError(
            "OpenAI's CLIP needs QuickGELU, but this model has "
            f"{', '.join(sorted(activations)) or 'no activation named gelu'}: "
            f"build it as open_clip's {ARCHITECTURE}"
        )


def object_crops(image: Image.Image, detections: Detections) -> list[Image.Image]:
    """The part of the image inside each box, with everything outside the mask gray."""
    upright = upright_rgb(image)
    blank = Image.new("RGB", upright.size, BACKGROUND)
    crops = []
    for index, box in enumerate(detections.boxes):
        shown = upright
        if detections.masks is not None:
            mask = detections.masks[index]
            assert mask.shape == upright.size[::-1], (mask.shape, upright.size)
            shown = Image.composite(upright, blank, Image.fromarray(mask))
        left, top, right, bottom = (round(float(edge)) for edge in box)
        crops.append(shown.crop((left, top, right, bottom)))
    return crops


def color_texts(name: str) -> list[list[str]]:
    """The three texts that describe an object of this name, for each color."""
    return [[t.format(color=color, name=name) for t in TEMPLATES] for color in COLORS]


def class_embeddings(text_embeddings_CTD: Tensor) -> Tensor:
    """Classifier [D, C]: each color's mean of normalized text embeddings, normalized again."""
    mean_CD = F.normalize(text_embeddings_CTD, dim=-1).mean(dim=1)
    return (mean_CD / mean_CD.norm(dim=-1, keepdim=True)).T


def color_logits(image_embeddings_ND: Tensor, classifier_DC: Tensor) -> Tensor:
    """100 x cosine similarity, [N, C]."""
    return LOGIT_SCALE * F.normalize(image_embeddings_ND, dim=-1) @ classifier_DC


def first_largest(logits_NC: Tensor) -> list[int]:
    """Argmax of each row; the first of equal values."""
    return logits_NC.float().cpu().numpy().argmax(axis=1).tolist()

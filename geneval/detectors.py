"""Detectors by name: the official one, its approximation, and the shapes world's.

- `mask2former`: Mask2Former Swin-S with the weights that define GenEval, and CLIP for colors.
- `mask2former-hf`: the same code with the weights of the hub's
  facebook/mask2former-swin-small-coco-instance, another training run. Its scores are
  close to GenEval's but are not GenEval scores.
- `shapes`: exact, for pictures of the offline shapes world.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from geneval.detector import Detector
from t2i.errors import UserError, choose_one
from t2i.files import replacing_folder, saving
from t2i.published import ProvenFile, PublishedFile, fetch_folder, hashes_by_name
from t2i.worlds import open_world

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

    from geneval.colors import ColorClassifier
    from geneval.mask2former import Mask2FormerDetector

DETECTORS = ("mask2former", "mask2former-hf", "shapes")
HUB_APPROXIMATION = "facebook/mask2former-swin-small-coco-instance"
_CONVERSION = 1  # names the cached folder; raise it if geneval.mmdet_weights converts differently
_SHORTEST_HASH = 8
_LIBRARIES = ("torch", "transformers", "open-clip-torch", "pillow", "numpy")
_OPTION = "--detector-weights (in training: --reward.detector-weights)"
_ADVICE = f"copy it into the folder that you give as {_OPTION}"

# The hashes come from the files' names or addresses: OpenMMLab puts the first digits of the SHA-256
# into the name, OpenAI all of it into the address.
#
# One training run in two files: mmdet 3.x's (which GenEval's download script fetches) and 2.x's.
MASK2FORMER = PublishedFile(
    title="Mask2Former Swin-S (COCO instances)",
    url="https://download.openmmlab.com/mmdetection/v3.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    names=(
        "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",  # as GenEval's script renames it
    ),
    hashes=("c9d0c4f2", "743b7d99"),
    cache="geneval",
    advice=_ADVICE,
)
CLIP = PublishedFile(
    title="OpenAI CLIP ViT-L/14",
    url="https://openaipublic.azureedge.net/clip/models/"
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    names=("ViT-L-14.pt",),
    hashes=("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",),
    cache="geneval",
    advice=_ADVICE,
)


def load_detector(
    name: str,
    *,
    weights: Path | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
) -> Detector:
    """Load a detector.

    name: one of `DETECTORS`.
    weights: the detector's file, or the folder that holds it (for `mask2former-hf`, the hub's
        folder); CLIP's file is looked for in the same folder. Default: the cache, else a download.
    sha256: first digits (at least 8) of the hash that the file at `weights` must have instead of
        the published one; `identity` then does not call the detector official.

    Raises:
        UserError: the name is unknown, or weights are missing, damaged or of another model; the
            message says what to do.
    """
    if name not in DETECTORS:
        raise UserError(f"unknown detector {name!r}; {choose_one(name, DETECTORS)}")
    if name == "shapes":
        if weights is not None or sha256 is not None:
            raise UserError("the shapes detector has no weights: leave out --detector-weights")
        return open_world(name).open_detector()
    from geneval.colors import ColorClassifier, load_clip, load_tokenizer
    from geneval.mask2former import Mask2FormerDetector
    from geneval.mmdet_weights import load_hub_folder

    weights = None if weights is None else Path(weights).expanduser()
    # Find and check all files before loading the first.
    if name == "mask2former":
        file = _official(weights, sha256)
        build, hashes = partial(_converted, file), {file.path.name: file.digest}
        clip_folder = None if weights is None else file.path.parent
    elif sha256 is not None:
        raise UserError(f"{name} takes no sha256: leave it out, or choose mask2former")
    else:
        folder = _approximation(weights)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
        build, hashes = partial(load_hub_folder, folder), hashes_by_name(files)
        clip_folder = weights
    clip = CLIP.find(clip_folder)
    colors = ColorClassifier(load_clip(clip.path), load_tokenizer(), device)
    identity = {
        "name": name,
        "official": name == "mask2former" and sha256 is None,
        "weights": {**hashes, clip.path.name: clip.digest},
        "color_precision": colors.precision,
        "libraries": {library: version(library) for library in _LIBRARIES},
    }
    return PhotoDetector(Mask2FormerDetector(build(), device=device), colors, identity)


class PhotoDetector:
    """Finds objects with Mask2Former, names their colors with CLIP; see `Detector`."""

    def __init__(self, objects: Mask2FormerDetector, colors: ColorClassifier, identity: dict):
        self.classes, self.detect = objects.classes, objects.detect
        self.colors, self.classify_colors = colors.colors, colors.classify
        self.objects, self._identity = objects, identity

    def identity(self) -> dict[str, Any]:
        """Name, whether its scores are official, weight hashes, precision and library versions."""
        return dict(self._identity)


def _official(weights: Path | None, sha256: str | None) -> ProvenFile:
    source = MASK2FORMER
    if sha256 is not None:
        if weights is None or len(sha256) < _SHORTEST_HASH:
            raise UserError(
                f"sha256={sha256!r}: give a hash of at least {_SHORTEST_HASH} digits, and the file "
                "that must have it (--detector-weights)"
            )
        source = replace(MASK2FORMER, hashes=(sha256.lower(),))
    return source.find() if weights is None else source.given(weights)


def _approximation(weights: Path | None) -> Path:
    if weights is not None and not weights.is_dir():
        raise UserError(f"{weights} is not a folder: mask2former-hf needs the hub's folder")
    return weights or fetch_folder(
        HUB_APPROXIMATION,
        ["config.json", "model.safetensors"],
        advice=f"Give its folder as {_OPTION}",
    )


def _converted(file: ProvenFile) -> Mask2FormerForUniversalSegmentation:
    """The model with the official weights: converted once, then loaded from the cache."""
    from geneval.mmdet_weights import load_hub_folder, load_mmdet

    cache = MASK2FORMER.cache_folder
    folder = cache / f"mask2former-{file.digest[:16]}-v{_CONVERSION}"
    if folder.is_dir():
        return load_hub_folder(folder)
    with saving(f"{cache} (T2I_CACHE names another folder)"):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with replacing_folder(folder) as partial:
                    load_mmdet(file.path).save_pretrained(partial)
    return load_hub_folder(folder)

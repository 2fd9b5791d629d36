"""GenEval's judge with random weights in the published layouts, for a rehearsal.

It consists of mmdetection's checkpoint of Mask2Former Swin-S, with 2.x names, and OpenAI's
TorchScript archive of CLIP. Random weights cannot have the published hashes, so the rehearsal
accepts theirs instead; everything else is as with the published files.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from geneval import detectors
from geneval.colors import ARCHITECTURE
from geneval.mmdet_weights import RECOMPUTED, WITHOUT_EFFECT, mmdet_name, released_config
from geneval.rules import judge_image
from t2i.published import remembered_sha256
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, Shapes, shapes_of
from t2i.weights import read_folder

SIZES = ("swin-s",)


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write both files into `folder`; there is only one size."""
    shapes = checkpoint_shapes(released_config())
    weights.pickle(folder / detectors.MASK2FORMER.names[0], shapes, nest="state_dict")
    clip = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE)).half()
    write_archive(clip, folder / detectors.CLIP.names[0])
    return Written(side=512)


def judge(folder: Path, image: Path) -> str:
    """Load both files as `geneval/run.py` does, judge an image, and describe the outcome."""
    file, clip = (folder / f.names[0] for f in (detectors.MASK2FORMER, detectors.CLIP))
    digest = remembered_sha256(file)
    detectors.CLIP = replace(detectors.CLIP, hashes=(remembered_sha256(clip),))
    detector = detectors.load_detector("mask2former", weights=file, sha256=digest)
    picture = Image.open(image)
    found = detector.detect(picture)
    name = next(iter(found))
    entry = {"tag": "colors", "prompt": f"a red {name}"}
    entry["include"] = [{"class": name, "count": 1, "color": "red"}]  # type: ignore[assignment]
    colors = detector.classify_colors(picture, name, found[name])
    verdict = judge_image(picture, entry, detector)
    total = sum(len(one) for one in found.values())
    return f"{total} objects of {len(found)} classes, {name}: {colors[:3]}, {verdict.reason!r}"


def checkpoint_shapes(config: Mask2FormerConfig) -> Shapes:
    """Names and shapes of the weights in mmdetection's checkpoint, with 2.x names."""
    with tempfile.TemporaryDirectory() as folder:
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
        stored = shapes_of(read_folder(folder, shapes_only=True))
    found: dict[str, tuple[int, ...]] = {}
    swin: Any = config.backbone_config
    for key, size in stored.items():
        if WITHOUT_EFFECT.fullmatch(key):
            continue
        name = mmdet_name(key)
        found[name] = (found.get(name, (0,))[0] + size[0], *size[1:])  # mmdet joins projections
        before, table, _ = name.partition(".relative_position_bias_table")
        if table:
            found[before + RECOMPUTED] = (swin.window_size**2,) * 2
    return found


class _Archive(nn.Module):
    """CLIP's weights in the layout of OpenAI's archive, which also holds constants."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        for name, value in clip.named_children():
            self.add_module(name, value)
        for name, parameter in clip.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(0))

    def forward(self, x):
        return x


def write_archive(clip: nn.Module, path: Path) -> None:
    """Write CLIP as an archive in OpenAI's layout."""
    torch.jit.trace(_Archive(clip), torch.zeros(1), check_trace=False).save(str(path))

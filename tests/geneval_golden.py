"""The golden Mask2Former of tests/golden/geneval_detector, as its config.json describes it."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from helpers import golden_folder

from geneval.mask2former import InputRules
from geneval.mmdet_weights import DetectorShape

ROOT = golden_folder("geneval_detector")
CONFIG = json.loads((ROOT / "config.json").read_text())
CASES = json.loads((ROOT / "expected.json").read_text())
CHECKPOINT = next(ROOT.glob("*.pth"))
SHAPE = DetectorShape(
    **{
        field.name: tuple(CONFIG[field.name])
        if isinstance(CONFIG[field.name], list)
        else CONFIG[field.name]
        for field in fields(DetectorShape)
    }
)
RULES = InputRules(
    long_side=max(CONFIG["img_scale"]),
    short_side=min(CONFIG["img_scale"]),
    pad_divisor=CONFIG["pad_size_divisor"],
    pad_value=CONFIG["pad_val"],
    mean=tuple(CONFIG["mean_rgb"]),
    std=tuple(CONFIG["std_rgb"]),
)


def state_dict(style: str = "v2") -> dict[str, torch.Tensor]:
    """The checkpoint's weights under mmdet 2.x's or 3.x's names."""
    weights = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    if style == "v2":
        return weights
    renamed = dict(json.loads((ROOT / "keys_v2_to_v3.json").read_text()))
    assert renamed.keys() <= weights.keys()
    return {renamed.get(key, key): value for key, value in weights.items()}


def write_checkpoint(path: Path, weights: dict[str, torch.Tensor], **meta) -> Path:
    """An mmdet checkpoint file."""
    torch.save({"meta": meta, "state_dict": weights}, path)
    return path

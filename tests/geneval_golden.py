"""The golden Mask2Former of tests/golden/geneval_detector, as its config.json describes it."""

import json
from pathlib import Path

import torch
from helpers import golden_folder
from transformers import Mask2FormerConfig, SwinConfig

from geneval.mask2former import InputRules

ROOT = golden_folder("geneval_detector")
CONFIG = json.loads((ROOT / "config.json").read_text())
CASES = json.loads((ROOT / "expected.json").read_text())
CHECKPOINT = next(ROOT.glob("*.pth"))
SHAPE = Mask2FormerConfig(
    backbone_config=SwinConfig(
        embed_dim=CONFIG["embed_dims"],
        depths=CONFIG["depths"],
        num_heads=CONFIG["num_heads"],
        window_size=CONFIG["window_size"],
        mlp_ratio=float(CONFIG["mlp_ratio"]),
        qkv_bias=CONFIG["qkv_bias"],
        out_features=[f"stage{i + 1}" for i in range(len(CONFIG["depths"]))],
    ),
    num_labels=CONFIG["num_classes"],
    feature_size=CONFIG["feat_channels"],
    mask_feature_size=CONFIG["feat_channels"],
    hidden_dim=CONFIG["feat_channels"],
    num_attention_heads=CONFIG["heads"],
    encoder_layers=CONFIG["encoder_layers"],
    encoder_feedforward_dim=CONFIG["encoder_ffn"],
    decoder_layers=CONFIG["decoder_layers"] + 1,
    dim_feedforward=CONFIG["decoder_ffn"],
    num_queries=CONFIG["num_queries"],
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
    """The checkpoint's weights, under the names of mmdet 2.x or 3.x."""
    weights = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    if style == "v2":
        return weights
    renamed = dict(json.loads((ROOT / "keys_v2_to_v3.json").read_text()))
    assert renamed.keys() <= weights.keys()
    return {renamed.get(key, key): value for key, value in weights.items()}


def write_checkpoint(path: Path, weights: dict[str, torch.Tensor], **meta) -> Path:
    """Write them as an mmdet checkpoint file."""
    torch.save({"meta": meta, "state_dict": weights}, path)
    return path

"""Make the offline world of `launch/train_imagenet.py --size shapes`: images by class, and a tiny base of a family.

    python launch/pretrain_class_shapes.py --backbone rar --out runs/class-shapes

    runs/class-shapes/images/train/<class>/000000.png ...      one shape in one colour: its class
    runs/class-shapes/rar/                                     tokenizer.pt, model.pt (official layouts), config.json

A class of the folder is shape x colour, named as in ImageNet (n00000000 ...). The tokenizer is trained first, then the generator from
random weights by the kit's own training loop, with k = 1. Nothing of it is shipped: a few minutes on two cores make it again.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli, presets
from t2i.data.imagenet import open_imagenet
from t2i.data.images import load_pixels
from t2i.data.shapes import PALETTE, Scene, SceneObject, render
from t2i.imaging import save_png
from t2i.training.config import (
    BackboneOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.tiny_classes import build_backbone, build_tokenizer, train_tokenizer, write_base

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = tuple(PALETTE)[:5]


@dataclass(frozen=True)
class Pretrain:
    """Recipe of a class-conditional shapes base."""

    backbone: Literal["llamagen", "open_magvit2", "rar"]
    out: Path = Path("runs/class-shapes")
    """Folder for the images and the base of each family."""
    images_per_class: int = 100
    image_size: int = 32
    """Side in pixels, 8 of which make a code."""
    tokenizer_steps: int = 600
    tokenizer_lr: float = 1e-3
    steps: int = 600
    """Optimizer steps of the generator."""
    lr: float = 2e-3
    batch_size: int = 64
    dim: int = 96
    layers: int = 4
    seed: int = 0


def write_images(cfg: Pretrain, folder: Path) -> None:
    """An ImageNet-style folder of single shapes; what is there is kept."""
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    for label, (shape, color) in enumerate(kinds):
        for i in range(cfg.images_per_class):
            path = folder / "train" / f"n{label:08d}" / f"{i:06d}.png"
            if not path.exists():
                dice = random.Random(f"class shapes {cfg.seed} {label} {i}")
                size = dice.randrange(24, 34, 2)
                x, y = (dice.randint(size // 2 + 2, 62 - size // 2) for _ in range(2))
                item = SceneObject(shape, color, x, y, size)
                save_png(render(Scene((item,), "single", "", {}), cfg.image_size), path)


def pretraining(cfg: Pretrain, start: Path, images: Path) -> TrainConfig:
    """The generator's training as a run of the kit: k = 1, every weight at one rate."""
    return TrainConfig(
        run_dir=cfg.out / f"{cfg.backbone}-pretraining",
        backbone=BackboneOptions(family=cfg.backbone, weights=str(start)),
        method=presets.base(),
        data=LabelledOptions(
            source=(str(images),),
            views="flip",
            validation_samples=max(1, 2 * cfg.images_per_class // 5),
            cache_dir=cfg.out / "cache",
        ),
        optim=OptimOptions(backbone_lr=cfg.lr, warmup_steps=min(50, cfg.steps // 4)),
        engine=EngineOptions(micro_batch=cfg.batch_size),
        log=LogOptions(validate_every=200, sample_every=0, save_every=0, prompts=("0",)),
        batch_size=cfg.batch_size,
        steps=cfg.steps,
        token_dropout=0.0,
        seed=cfg.seed,
    )


def pretrain(cfg: Pretrain) -> Path:
    """Make what is not there yet; returns the folder of the base."""
    from t2i.checkpoint import find_checkpoint, from_pretrained
    from t2i.training.loop import train

    images, base = cfg.out / "images", cfg.out / cfg.backbone
    write_images(cfg, images)
    if (base / "config.json").exists():
        return base
    files = open_imagenet(images).files
    pixels = torch.stack([load_pixels(path, cfg.image_size) for path in files])
    tokenizer = build_tokenizer(cfg.backbone, seed=cfg.seed)
    train_tokenizer(
        tokenizer, pixels, steps=cfg.tokenizer_steps, lr=cfg.tokenizer_lr, seed=cfg.seed
    )
    backbone = build_backbone(
        cfg.backbone,
        tokenizer,
        side=cfg.image_size // tokenizer.downsample,
        classes=len(SHAPES) * len(COLORS),
        dim=cfg.dim,
        layers=cfg.layers,
        seed=cfg.seed,
    )
    start = write_base(backbone, cfg.out / f"{cfg.backbone}-start")
    config = pretraining(cfg, start, images)
    if not (config.run_dir / "checkpoints").exists():
        train(config)
    trained = from_pretrained(find_checkpoint(config.run_dir)).backbone
    return write_base(trained, base)


def main() -> None:
    print(f"wrote {pretrain(cli.parse(Pretrain, __doc__))}")


if __name__ == "__main__":
    cli.run(main)

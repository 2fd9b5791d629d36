"""Make the offline world of `launch/train_imagenet.py --size shapes`: images by class, and a tiny
base of a family.

    python launch/lab/pretrain_class_shapes.py --backbone rar --out runs/class-shapes

    runs/class-shapes/images/train/<class>/000000.png ...      one shape in one colour: its class
    runs/class-shapes/rar/                                     tokenizer.pt, model.pt (official
    layouts), config.json

A class of the folder is shape x colour, named as in ImageNet (n00000000 ...). The tokenizer is
trained first, then the generator from random weights by the kit's own training loop, with k = 1.
Nothing of it is shipped: a few minutes on one core make it again. What was killed goes on, the
generator at its newest checkpoint; what is finished is kept, and only with the same recipe.
"""

import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run from a clone, without installation

from t2i import cli
from t2i.errors import UserError
from t2i.files import read_json, writable_folder, write_json
from t2i.imaging import save_png
from t2i.shapes.scenes import PALETTE, Scene, SceneObject, render

if TYPE_CHECKING:
    from t2i.models.base import Backbone
    from t2i.training.config import TrainConfig

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = tuple(PALETTE)[:5]


@dataclass(frozen=True)
class Pretrain:
    """Recipe of a class-conditional shapes base."""

    backbone: Literal["llamagen", "open_magvit2", "rar"]
    out: Path = Path("runs/class-shapes")
    """Folder for the images and the base of each family."""
    images_per_class: int = 200
    image_size: int = 24
    """Side in pixels, 4 of which make a code."""
    tokenizer_steps: int = 800
    tokenizer_lr: float = 4e-3
    """Peak learning rate."""
    steps: int = 600
    """Optimizer steps of the generator."""
    lr: float = 2e-3
    batch_size: int = 64
    dim: int = 96
    layers: int = 4
    seed: int = 0

    def __post_init__(self):
        names = ("images_per_class", "image_size", "tokenizer_steps", "steps", "batch_size")
        for name in (*names, "dim", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        from t2i.shapes.tiny_classes import PIXELS_PER_CODE

        if self.image_size % PIXELS_PER_CODE:
            raise UserError(f"image_size={self.image_size} must be a multiple of {PIXELS_PER_CODE}")


CLASSES = tuple((shape, color) for shape in SHAPES for color in COLORS)
"""What a class id means."""


def claim(record: Path, settings: dict) -> None:
    """Note what a folder is made from; UserError if it was begun with something else."""
    known = read_json(record) if record.exists() else settings
    if known != settings:
        raise UserError(
            f"{record} says that this was made otherwise: {known}, and now {settings} is asked for; give another --out, or delete it"
        )
    writable_folder(record.parent)
    write_json(record, settings)


def write_images(cfg: Pretrain, folder: Path) -> None:
    """An ImageNet-style folder of single shapes; what is there is kept."""
    names = ("images_per_class", "image_size", "seed")
    claim(folder / "recipe.json", {name: getattr(cfg, name) for name in names})
    for label in range(len(CLASSES)):
        for i in range(cfg.images_per_class):
            path = folder / "train" / f"n{label:08d}" / f"{i:06d}.png"
            if not path.exists():
                save_png(class_image(label, i, cfg.image_size, cfg.seed), path)


def class_image(label: int, number: int, size: int, seed: int) -> Image.Image:
    """Image `number` of a class, `size` pixels wide: one shape at a random place and of a random
    size.
    """
    dice = random.Random(f"class shapes {seed} {label} {number}")
    side = dice.randrange(24, 34, 2)
    x, y = (dice.randint(side // 2 + 2, 62 - side // 2) for _ in range(2))
    return render(Scene((SceneObject(*CLASSES[label], x, y, side),), "single", "", {}), size)


def pretraining(cfg: Pretrain, start: Path, images: Path) -> "TrainConfig":
    """The generator's training as a run of the kit: k = 1, every weight at one rate.

    What fine-tuning holds out is held out here, too (the first of one random order): no base has
    seen it.
    """
    from t2i.tensorar import presets
    from t2i.training.config import (
        BackboneOptions,
        EngineOptions,
        LabelledOptions,
        LogOptions,
        OptimOptions,
        TrainConfig,
    )

    return TrainConfig(
        run_dir=cfg.out / f"{cfg.backbone}-pretraining",
        backbone=BackboneOptions(family=cfg.backbone, weights=str(start)),
        method=presets.base(),
        data=LabelledOptions(
            source=(str(images),),
            views="flip",
            validation_samples=min(256, len(CLASSES) * cfg.images_per_class // 5),
            cache_dir=cfg.out / "cache",
        ),
        optim=OptimOptions(backbone_lr=cfg.lr, warmup_steps=min(50, cfg.steps // 4)),
        engine=EngineOptions(micro_batch=cfg.batch_size),
        log=LogOptions(validate_every=200, sample_every=0, save_every=200, prompts=("0",)),
        batch_size=cfg.batch_size,
        steps=cfg.steps,
        token_dropout=0.0,
        seed=cfg.seed,
    )


def pretrain(cfg: Pretrain) -> Path:
    """Make what is not there yet; returns the folder of the base.

    Raises:
        UserError: what is there was made with another recipe.
    """
    from launch.lab.fine_tuning import fine_tuned
    from t2i.shapes.tiny_classes import write_base

    writable_folder(cfg.out)
    images, base = cfg.out / "images", cfg.out / cfg.backbone
    start = cfg.out / f"{cfg.backbone}-start"
    write_images(cfg, images)
    recipe = {name: value for name, value in asdict(cfg).items() if name != "out"}
    claim(cfg.out / f"{cfg.backbone}-recipe.json", recipe)
    if not (base / "config.json").exists():
        if not (start / "config.json").exists():
            write_base(untrained(cfg, images), start)
        write_base(fine_tuned(pretraining(cfg, start, images)).backbone, base)
    return base


def untrained(cfg: Pretrain, images: Path) -> "Backbone":
    """A generator with fresh weights behind a tokenizer that has learned the images."""
    import torch

    from t2i.data.images import ImageRules
    from t2i.data.sources.classes import open_imagenet
    from t2i.shapes.tiny_classes import build_backbone, build_tokenizer, train_tokenizer

    paths = open_imagenet(images).paths
    pixels = torch.cat([ImageRules(cfg.image_size).load(path) for path in paths])
    tokenizer = build_tokenizer(cfg.backbone, seed=cfg.seed)
    train_tokenizer(
        tokenizer, pixels, steps=cfg.tokenizer_steps, lr=cfg.tokenizer_lr, seed=cfg.seed
    )
    return build_backbone(
        cfg.backbone,
        tokenizer,
        side=cfg.image_size // tokenizer.downsample,
        classes=len(CLASSES),
        dim=cfg.dim,
        layers=cfg.layers,
        seed=cfg.seed,
    )


def main() -> None:
    print(f"wrote {pretrain(cli.parse(Pretrain, __doc__))}")


if __name__ == "__main__":
    cli.run(main)

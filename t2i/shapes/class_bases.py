"""Trains tiny class-conditional bases from scratch: images, image tokenizer, generator."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i.data.images import ImageRules
from t2i.data.sources.classes import LabelledFolder
from t2i.errors import UserError
from t2i.files import read_json, writable_folder, write_json
from t2i.imaging import save_png
from t2i.models.base import Backbone
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.open_magvit2.open_magvit2_model import OpenMAGVIT2, OpenMAGVIT2Config
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.shapes.fine_tuning import fine_tuned
from t2i.shapes.pretraining import ImageTokenizer, train_tokenizer, write_base
from t2i.shapes.scenes import CLASSES, class_image
from t2i.shapes.tiny_recipes import ClassBase
from t2i.tensorar import presets
from t2i.training.config import (
    BackboneOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)

_CODES, _BITS = 512, (6, 6)
_HEAD = 32  # width of an attention head
_TOKENIZER_BATCH = 32
_SAMPLING = {"cfg_scale": 2.0}


def make_class_base(cfg: ClassBase) -> Path:
    """Make the images and the base unless they exist; returns the base's folder.

    Raises:
        UserError: existing files were made with different settings.
    """
    writable_folder(cfg.out)
    images, base = cfg.out / "images", cfg.out / cfg.backbone
    start = cfg.out / f"{cfg.backbone}-start"
    write_class_images(cfg, images)
    recipe = {name: value for name, value in asdict(cfg).items() if name != "out"}
    _claim(cfg.out / f"{cfg.backbone}-recipe.json", recipe)
    if not (base / "config.json").exists():
        if not (start / "config.json").exists():
            write_base(untrained(cfg, images), start, _SAMPLING)
        write_base(fine_tuned(pretraining(cfg, start, images)).backbone, base, _SAMPLING)
    return base


def _claim(record: Path, settings: dict) -> None:
    """Record the settings that files are made with; UserError if others are recorded already."""
    known = read_json(record) if record.exists() else settings
    if known != settings:
        raise UserError(
            f"{record} records different settings, {known}, from those given now, {settings}: "
            "give another --out, or delete the old files and this record"
        )
    writable_folder(record.parent)
    write_json(record, settings)


def write_class_images(cfg: ClassBase, folder: Path) -> None:
    """Write an ImageNet-style folder, train/n00000000/000000.png ...; existing images are kept."""
    names = ("images_per_class", "image_size", "seed")
    _claim(folder / "recipe.json", {name: getattr(cfg, name) for name in names})
    for label in range(len(CLASSES)):
        for number in range(cfg.images_per_class):
            path = folder / "train" / f"n{label:08d}" / f"{number:06d}.png"
            if not path.exists():
                save_png(class_image(label, number, cfg.image_size, cfg.seed), path)


def untrained(cfg: ClassBase, images: Path) -> Backbone:
    """A generator with new weights, with an image tokenizer trained on the images."""
    rules = ImageRules(cfg.image_size)
    pixels = torch.cat([rules.load(path) for path in LabelledFolder(images).paths])
    tokenizer = build_tokenizer(cfg.backbone, seed=cfg.seed)
    batches = _batches(pixels, torch.Generator().manual_seed(cfg.seed))
    train_tokenizer(tokenizer, batches, steps=cfg.tokenizer_steps, lr=cfg.tokenizer_lr)
    return build_backbone(cfg, tokenizer)


def _batches(pixels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield pixels[torch.randint(len(pixels), (_TOKENIZER_BATCH,), generator=generator)]


def build_tokenizer(family: str, *, seed: int = 0) -> ImageTokenizer:
    """A small tokenizer of the family's type with new weights: 512 codes, or 12 bits."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1}
    if family == "llamagen":
        return VQTokenizer(VQConfig(**shape, latent_channels=32, codebook_size=_CODES))
    if family == "rar":
        tokenizer = MaskGITVQGAN(MaskGITConfig(**shape, codebook_size=_CODES, codebook_dim=16))
        nn.init.normal_(tokenizer.quantize.embedding.weight)
        return tokenizer
    return LFQTokenizer(LFQConfig(**shape, bits=sum(_BITS)))


def build_backbone(cfg: ClassBase, tokenizer: ImageTokenizer) -> Backbone:
    """A generator with new weights and without dropout."""
    side = cfg.image_size // tokenizer.downsample
    shape: dict[str, Any] = {"dim": cfg.dim, "n_layer": cfg.layers, "grid": (side, side)}
    shape |= {"n_head": max(1, cfg.dim // _HEAD), "num_classes": len(CLASSES)}
    no_dropout = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    llama = {**shape, **no_dropout, "ffn_dim": 4 * cfg.dim}
    generator = torch.Generator().manual_seed(cfg.seed)
    backbone: Backbone
    if cfg.backbone == "llamagen":
        backbone = LlamaGen(LlamaGenConfig(**llama, vocab_size=_CODES))
        backbone.gpt.initialize(generator)
    elif cfg.backbone == "open_magvit2":
        backbone = OpenMAGVIT2(OpenMAGVIT2Config(**llama, n_intra_layer=1, bits=_BITS))
        backbone.transformer.initialize(generator)
    else:
        shape |= {"mlp_dim": 4 * cfg.dim, "dropout": 0.0, "attn_dropout": 0.0}
        backbone = RAR(RARConfig(**shape, vocab_size=_CODES))
        backbone.gpt.initialize(generator)
    backbone.frozen.tokenizer = tokenizer
    return backbone.eval()


def pretraining(cfg: ClassBase, start: Path, images: Path) -> TrainConfig:
    """Settings to train the generator as a run of the kit: k = 1, all weights at the same rate.

    Holds out the same images as fine-tuning does (the first ones of the same random order), so no
    base has seen them.
    """
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

"""Settings for class-conditional models on ImageNet: every published size of LlamaGen, Open-MAGVIT2
and RAR.

The recipe is the paper's (arXiv 2505.16324): batch 256, 20 epochs, AdamW (0.9, 0.95), weight decay
0.05, clipping at 1.0, 10 % of the classes dropped, token dropout 0.1, the codec's rate falling to
0, a lower constant one for the backbone. Both rates are lost in all copies of the paper: those here
are our choice, a tenth of the usual pre-training rates for the backbone.

Views of an image are those that the base was trained on: LlamaGen ten-crop of two ranges, RAR
ten-crop of one. Open-MAGVIT2 was trained on random crops along the longer side, unmirrored, encoded
anew each time; its nearest fixed set is the centre and its mirror image.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from t2i.errors import UserError
from t2i.models.llamagen.llamagen_recipes import OWN_PICTURES
from t2i.tensorar import presets
from t2i.training.config import (
    BackboneOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)

SHAPES_ROOT = Path("runs/class-shapes")
"""Where the offline world is looked for."""
_CLASSES = (
    "207",
    "360",
    "387",
    "974",
    "88",
    "979",
    "417",
    "279",
)  # the examples of LlamaGen's demo


@dataclass(frozen=True)
class ImageNetModel:
    """Which model to fine-tune, and how; decides the defaults of all other options."""

    backbone: Literal["llamagen", "open_magvit2", "rar"]
    size: str
    """llamagen B, L, XL, XXL, 3B; open_magvit2 B, L, XL; rar B, L, XL, XXL; or shapes: the offline
    world.
    """
    resolution: Literal[256, 384] | None = None
    """Of the images, where a size was published at two (LlamaGen B and L; 256 if not given)."""
    preset: Literal["tuned", "iclr2026", "arxiv2505", "base"] = "tuned"
    """Settings of the method: tuned is the recommended one (docs/recipe.md), iclr2026 and arxiv2505
    are the papers'; base is the control, fine-tuned as usual.
    """


@dataclass(frozen=True)
class _Published:
    """A family's files and data, with what fits into 80 GB at each size."""

    weights: str
    """File on the hub; {size} and {resolution} are filled in."""
    tokenizer: str | None
    data: LabelledOptions
    micro_batches: dict[str, int]
    resolutions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Published resolutions of a size; 256 if it is not listed."""


_PUBLISHED = {
    "llamagen": _Published(
        "FoundationVision/LlamaGen:c2i_{size}_{resolution}.pt",
        "FoundationVision/LlamaGen:vq_ds16_c2i.pt",
        LabelledOptions(views="ten-crop", crop_ranges=(1.1, 1.05)),
        {"B": 32, "L": 16, "XL": 8, "XXL": 8, "3B": 4},
        {
            "B": (256, 384),
            "L": (256, 384),
            **dict.fromkeys(("XL", "XXL", "3B"), (384,)),
        },
    ),
    "open_magvit2": _Published(
        "TencentARC/Open-MAGVIT2-AR-{size}-256-resolution:AR_256_{size}.ckpt",
        None,
        LabelledOptions(views="flip"),
        {"B": 16, "L": 8, "XL": 8},
    ),
    "rar": _Published(
        "yucornetto/RAR:rar_{size_lower}.bin",
        "fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin",
        LabelledOptions(views="ten-crop", crop_ranges=(1.1,)),
        {"B": 32, "L": 16, "XL": 8, "XXL": 8},
    ),
}


def imagenet_recipe(model: ImageNetModel) -> TrainConfig:
    """The settings of a published model; UserError says which sizes there are."""
    if model.size == "shapes":
        return _shapes(model)
    published = _PUBLISHED[model.backbone]
    if model.size not in published.micro_batches:
        raise UserError(
            f"--size {model.size}: {model.backbone} was published as {', '.join(published.micro_batches)} (or shapes, offline)"
        )
    resolutions = published.resolutions.get(model.size, (256,))
    resolution = model.resolution or resolutions[0]
    if resolution not in resolutions:
        raise UserError(
            f"--resolution {resolution}: {model.backbone} {model.size} was published at "
            f"{' and '.join(map(str, resolutions))} px"
        )
    names = {"size": model.size, "size_lower": model.size.lower(), "resolution": resolution}
    return TrainConfig(
        run_dir=Path(f"runs/{model.backbone}-{model.size.lower()}-{resolution}"),
        backbone=BackboneOptions(
            family=model.backbone,
            weights=published.weights.format(**names),
            tokenizer=published.tokenizer,
        ),
        method=presets.method(model.preset),
        data=published.data,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-5, warmup_steps=None),
        engine=EngineOptions(
            zero_stage=2,
            precision="bf16",
            micro_batch=published.micro_batches[model.size],
            gradient_checkpointing=model.size in ("XL", "XXL", "3B"),
        ),
        log=replace(OWN_PICTURES, prompts=_CLASSES),
    )


def _shapes(model: ImageNetModel) -> TrainConfig:
    """The offline world of `launch/lab/pretrain_class_shapes.py`: small batches, two cores, a few
    minutes.
    """
    root = SHAPES_ROOT
    return TrainConfig(
        run_dir=Path(f"runs/{model.backbone}-shapes"),
        backbone=BackboneOptions(family=model.backbone, weights=str(root / model.backbone)),
        method=presets.method(model.preset),
        data=LabelledOptions(source=(str(root / "images"),), views="flip", validation_samples=256),
        optim=OptimOptions(codec_lr=3e-3, backbone_lr=1e-4, warmup_steps=20),
        engine=EngineOptions(micro_batch=32),
        log=LogOptions(save_every=100, prompts=("0", "5", "10", "15")),
        batch_size=32,
        steps=200,
        token_dropout=0.0,
    )

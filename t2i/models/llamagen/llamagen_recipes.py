"""Recipes for LlamaGen: text-to-image, ImageNet, and the offline shapes world.

Our own experiments recommend `tuned` (docs/recipe.md): it is level with the control, while both
published methods fall below it. Runs of more than about 400 steps should train on own drafts only,
as `small-data` does. The learning rates of the real sizes are not tuned: those of adapters are the
usual ones for LoRA, the others a tenth of those in pre-training.
"""

from dataclasses import replace

from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    LabelledOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.recipes import (
    METHODS,
    OWN_PICTURES,
    Recipes,
    bf16,
    class_shapes,
    imagenet,
    in_own_folders,
    on_two_cores,
    small_data,
)
from t2i.tuning import Tuning

_IMAGENET = {
    ("B", 256): 32,
    ("B", 384): 32,
    ("L", 256): 16,
    ("L", 384): 16,
    ("XL", 384): 8,
    ("XXL", 384): 8,
    ("3B", 384): 4,
}
"""Micro-batch size by published size and resolution."""
_IMAGENET_DATA = LabelledOptions(views="ten-crop", crop_ranges=(1.1, 1.05))
"""The views that the bases were trained on."""


def recipes() -> Recipes:
    """Recipes by name; any option can be overridden on the command line."""
    return text_recipes() | class_recipes()


def class_recipes() -> Recipes:
    """Class-conditional recipes: ImageNet, and offline classes of shapes."""
    found: Recipes = {}
    for (size, resolution), micro_batch in _IMAGENET.items():
        found |= imagenet(
            f"llamagen-{size.lower()}-{resolution}",
            f"LlamaGen-{size} at {resolution} px",
            BackboneOptions(
                family="llamagen",
                weights=f"FoundationVision/LlamaGen:c2i_{size}_{resolution}.pt",
                tokenizer="FoundationVision/LlamaGen:vq_ds16_c2i.pt",
            ),
            _IMAGENET_DATA,
            micro_batch=micro_batch,
            gradient_checkpointing=size in ("XL", "XXL", "3B"),
        )
    return found | class_shapes("llamagen")


def text_recipes() -> Recipes:
    """Text-to-image recipes, and offline ones on captioned shapes."""
    xl, shapes = "LlamaGen text-to-image XL at 256 px", "offline shapes world"
    own_shapes = replace(_shapes(presets.tuned()), data=DataOptions(), log=OWN_PICTURES, steps=None)
    found: Recipes = {}
    for end, (method, words) in METHODS.items():
        codec_lr = 3e-3 if end == "tuned" else 1e-3
        found[f"shapes-{end}"] = (f"{shapes}, {words}", _shapes(method, codec_lr))
    found["shapes-small-data"] = (
        "the small-data recipe on the offline base, for your own pictures at 64 px on two cores",
        small_data(own_shapes),
    )
    for end, (method, words) in METHODS.items():
        found[f"t2i-xl-256-{end}"] = (f"{xl}, {words}", _llamagen_t2i(method))
    found["t2i-xl-256-lora"] = (
        f"{xl}, LoRA on the backbone, light drafts, half of them its own",
        _llamagen_t2i(presets.tuned(), tuning="lora", backbone_lr=1e-4),
    )
    found["t2i-xl-256-small-data"] = (
        f"{xl}, a few thousand pictures on one GPU: LoRA, own drafts",
        small_data(_llamagen_t2i(presets.tuned())),
    )
    return in_own_folders(found)


def _shapes(method: TensorARConfig, codec_lr: float = 1e-3) -> TrainConfig:
    """The shipped base on the offline world; all methods get the same backbone learning rate."""
    return on_two_cores(
        TrainConfig(
            method=method,
            data=DataOptions(source="shapes", validation_samples=256),
            optim=OptimOptions(codec_lr=codec_lr, backbone_lr=1e-4, warmup_steps=20),
        )
    )


def _llamagen_t2i(
    method: TensorARConfig, tuning: Tuning = "full", backbone_lr: float = 1e-5
) -> TrainConfig:
    """LlamaGen GPT-XL, stage 1 (256 px), with the published recipe."""
    return TrainConfig(
        backbone=BackboneOptions(
            weights="peizesun/llamagen_t2i:t2i_XL_stage1_256.pt",
            tokenizer="peizesun/llamagen_t2i:vq_ds16_t2i.pt",
            text_encoder="google/flan-t5-xl",
            text_encoder_dtype="bfloat16",
        ),
        method=method,
        tuning=tuning,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=backbone_lr, warmup_steps=None),
        engine=bf16(8),
        log=OWN_PICTURES,
    )

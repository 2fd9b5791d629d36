"""Recipes for RAR on ImageNet and, offline, on classes of shapes."""

from t2i.training.config import BackboneOptions, LabelledOptions
from t2i.training.recipes import Recipes, class_shapes, imagenet

_MICRO_BATCHES = {"b": 32, "l": 16, "xl": 8, "xxl": 8}
"""Micro-batch size by published size."""
_DATA = LabelledOptions(views="ten-crop", crop_ranges=(1.1,))
"""The views that the bases were trained on."""


def recipes() -> Recipes:
    """Recipes by name; any option can be overridden on the command line."""
    found: Recipes = {}
    for size, micro_batch in _MICRO_BATCHES.items():
        found |= imagenet(
            f"rar-{size}",
            f"RAR-{size.upper()} at 256 px",
            BackboneOptions(
                family="rar",
                weights=f"yucornetto/RAR:rar_{size}.bin",
                tokenizer="fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin",
            ),
            _DATA,
            micro_batch=micro_batch,
            gradient_checkpointing=size in ("xl", "xxl"),
        )
    return found | class_shapes("rar")

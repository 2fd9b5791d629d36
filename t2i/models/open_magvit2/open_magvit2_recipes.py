"""Recipes for Open-MAGVIT2 on ImageNet and, offline, on classes of shapes.

The bases were trained on random crops along the longer side, not mirrored and encoded afresh at
every step. The closest fixed set of views is the center crop and its mirror image.
"""

from t2i.training.config import BackboneOptions, LabelledOptions
from t2i.training.recipes import Recipes, class_shapes, imagenet

_MICRO_BATCHES = {"B": 16, "L": 8, "XL": 8}
"""Micro-batch size by published size."""


def recipes() -> Recipes:
    """Recipes by name; any option can be overridden on the command line."""
    found: Recipes = {}
    for size, micro_batch in _MICRO_BATCHES.items():
        repo = f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution"
        found |= imagenet(
            f"open-magvit2-{size.lower()}",
            f"Open-MAGVIT2-{size} at 256 px",
            BackboneOptions(family="open_magvit2", weights=f"{repo}:AR_256_{size}.ckpt"),
            LabelledOptions(views="flip"),
            micro_batch=micro_batch,
            gradient_checkpointing=size == "XL",
        )
    return found | class_shapes("open_magvit2")

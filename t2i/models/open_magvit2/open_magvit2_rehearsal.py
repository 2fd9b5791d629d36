"""Open-MAGVIT2 with random weights in its authors' layout, for a rehearsal: one fp32 file with the
generator and its image tokenizer under "state_dict".
"""

from pathlib import Path

import torch

from t2i.models.open_magvit2 import open_magvit2_model
from t2i.models.open_magvit2.open_magvit2_model import ARCheckpoint, OpenMAGVIT2, OpenMAGVIT2Config
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, shapes_of

SIZES = open_magvit2_model.SIZES


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write the file of a size; return it with the recipe that trains it."""
    config = OpenMAGVIT2Config(**SIZES[size], grid=(16, 16))
    with torch.device("meta"):
        backbone = OpenMAGVIT2(config)
        backbone.frozen.tokenizer = LFQTokenizer(LFQConfig())
    shapes = shapes_of(ARCheckpoint(backbone).state_dict())
    path = weights.pickle(folder / f"AR_256_{size}.ckpt", shapes, nest="state_dict")
    recipe = f"open-magvit2-{size.lower()}"
    return Written(256, {"weights": str(path)}, "train-imagenet", recipe, config.num_classes)

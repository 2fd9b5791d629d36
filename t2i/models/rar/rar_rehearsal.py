"""RAR with random weights in its authors' layout, for a rehearsal: one flat fp32 pickle each for
the generator and the image tokenizer.
"""

from pathlib import Path

import torch

from t2i.models.rar import rar_model
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, shapes_of

SIZES = rar_model.SIZES


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write the files of a size; return them with the recipe that trains them."""
    config = RARConfig(**SIZES[size])
    with torch.device("meta"):
        backbone, tokenizer = RAR(config), MaskGITVQGAN(MaskGITConfig())
    files = {
        "weights": f"rar_{size.lower()}.bin",
        "tokenizer": "maskgit-vqgan-imagenet-f16-256.bin",
    }
    base = {name: str(folder / file) for name, file in files.items()}
    weights.pickle(folder / files["weights"], shapes_of(backbone.official_state_dict()), nest=None)
    weights.pickle(folder / files["tokenizer"], shapes_of(tokenizer.state_dict()), nest=None)
    return Written(256, base, "train-imagenet", f"rar-{size.lower()}", config.num_classes)

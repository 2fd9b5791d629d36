"""The tiny models that `soak.py` trains, one per family: base, images, program and recipe. Tests
also train those that draw captions.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.files import write_json

if TYPE_CHECKING:
    from torch import nn

    from t2i.models.tokenizers.vq import VQTokenizer

Fill = Callable[["nn.Module"], object]
"""Sets a module's weights."""
TINY: dict[str, Any] = {
    **{"dim": 64, "n_layer": 2, "n_head": 2, "ffn_dim": 128, "vocab_size": 64, "grid": (4, 4)},
    **{"cond": "text", "caption_tokens": 12, "caption_dim": 32},
    **{"resid_dropout": 0.0, "ffn_dropout": 0.0},  # dropout would differ for every batch split
}
"""A LlamaGen so small that training takes seconds."""
_WORDS = "a photo of two three red green blue circle square star left right above below"
_PICTURES = 60


@dataclass(frozen=True)
class SoakModel:
    """How the model of a family is made and trained."""

    program: str
    """File name in launch/."""
    recipe: str
    write_base: Callable[[Path], object]
    write_data: Callable[[Path], object]
    on_hub: str = "somebody/model:weights.pt"
    """A name that its weights could have on the hub."""
    classes: bool = False
    """Draws classes, not captions."""


def _scenes(folder: Path) -> None:
    from t2i.shapes.shapes_source import write_dataset

    write_dataset(folder, _PICTURES, size=32)


def _fill(module: "nn.Module") -> None:
    """Set random weights."""
    from torch import nn

    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def write_llamagen(folder: Path, fill: Fill = _fill, **settings: object) -> Path:
    """Write a LlamaGen folder for `--backbone.weights`: 4x4 codes of 8 pixels, no dropout."""
    import torch

    from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
    from t2i.shapes.tiny_t5 import build_tiny_t5

    config = LlamaGenConfig(**TINY)
    vq, gpt = _tiny_vq(), LlamaGen(config)
    fill(vq), fill(gpt)
    build_tiny_t5(folder / "text_encoder", [_WORDS], d_model=32, d_ff=32, num_layers=1)
    torch.save(vq.state_dict(), folder / "vq.pt")
    torch.save({"model": gpt.official_state_dict()}, folder / "gpt.pt")
    files = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text_encoder": "text_encoder"}
    about = {"family": "llamagen", **files, "config": asdict(config), **settings}
    write_json(folder / "config.json", about)
    return folder


def write_janus(folder: Path, fill: Fill | None = None) -> Path:
    """Write a Janus folder in transformers' layout, for images of the same size."""
    import torch

    from t2i.shapes.tiny_janus import build_tiny_janus

    vq = _tiny_vq().eval()
    (fill or _fill)(vq)
    shape = {"dim": 64, "layers": 2, "heads": 2, "ffn_dim": 128, "vocab_size": 320}
    backbone = build_tiny_janus([_WORDS], vq, side=4, **shape)
    if fill is not None:
        fill(backbone.janus)
    folder.mkdir(parents=True)
    backbone.save_official(folder, torch.float32)
    return folder


def _tiny_vq() -> "VQTokenizer":
    import torch

    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    return VQTokenizer(VQConfig(32, (1, 1, 1, 1), 1, 32, codebook_size=64, codebook_dim=8))


def _of_classes(family: str) -> SoakModel:
    """A class-conditional family, on twenty classes of shapes: 6x6 codes of 4 pixels."""

    def write_base(folder: Path) -> None:
        from t2i.shapes.class_bases import build_backbone, build_tokenizer
        from t2i.shapes.pretraining import write_base

        backbone = build_backbone(_recipe(family), build_tokenizer(family))
        write_base(backbone, folder, {})

    def write_data(folder: Path) -> None:
        from t2i.shapes.class_bases import write_class_images

        write_class_images(_recipe(family), folder)

    recipe = f"{family.replace('_', '-')}-shapes-iclr2026"
    return SoakModel("train_imagenet.py", recipe, write_base, write_data, classes=True)


def _recipe(family: Any):
    from t2i.shapes.tiny_recipes import ClassBase

    return ClassBase(family, images_per_class=_PICTURES // 20, dim=64, layers=2)


MODELS = {
    "llamagen": SoakModel("train_llamagen.py", "shapes-iclr2026", write_llamagen, _scenes),
    "janus": SoakModel(
        "train_janus.py", "shapes-janus-lora", write_janus, _scenes, "somebody/model"
    ),
    "open_magvit2": _of_classes("open_magvit2"),
    "rar": _of_classes("rar"),
}
"""By family. Janus trains adapters and its image layers, the others all weights."""

"""The tiny models that `soak.py` trains, one of a family: base, pictures, program and recipe."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t2i.files import write_json

TINY: dict[str, Any] = {
    **{"dim": 64, "n_layer": 2, "n_head": 2, "ffn_dim": 128, "vocab_size": 64, "grid": (4, 4)},
    **{"cond": "text", "caption_tokens": 12, "caption_dim": 32},
    **{"resid_dropout": 0.0, "ffn_dropout": 0.0},  # drawn anew for every split
}
"""Shape of a LlamaGen whose training takes seconds."""
_WORDS = "a photo of two red green blue circle square star left right above below"
_PICTURES = 60


@dataclass(frozen=True)
class SoakModel:
    """How the model of a family is made and trained."""

    program: str
    """In launch/."""
    recipe: str
    write_base: Callable[[Path], object]
    write_data: Callable[[Path], object]
    on_hub: str = "somebody/model:weights.pt"
    """How its weights could be called there."""
    classes: bool = False
    """It draws classes, not captions."""


def _scenes(folder: Path) -> None:
    from t2i.shapes.shapes_source import write_dataset

    write_dataset(folder, _PICTURES, size=32)


def _llamagen(folder: Path) -> None:
    """A LlamaGen with random weights: 4x4 codes of 8 pixels."""
    import torch

    from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
    from t2i.shapes.tiny_t5 import build_tiny_t5

    config = LlamaGenConfig(**TINY)
    vq = _tiny_vq()
    gpt = LlamaGen(config)
    for p in (*gpt.parameters(), *vq.parameters()):
        torch.nn.init.normal_(p, std=0.2)
    build_tiny_t5(folder / "text_encoder", [_WORDS], d_model=32, d_ff=32, num_layers=1)
    torch.save(vq.state_dict(), folder / "vq.pt")
    torch.save({"model": gpt.official_state_dict()}, folder / "gpt.pt")
    files = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text_encoder": "text_encoder"}
    write_json(folder / "config.json", {"family": "llamagen", **files, "config": asdict(config)})


def _janus(folder: Path) -> None:
    """A Janus folder in transformers' layout, of as many codes."""
    import torch

    from t2i.shapes.tiny_janus import build_tiny_janus

    vq = _tiny_vq()
    for p in vq.parameters():
        torch.nn.init.normal_(p, std=0.2)
    shape = {"dim": 64, "layers": 2, "heads": 2, "ffn_dim": 128, "vocab_size": 320}
    folder.mkdir(parents=True)
    build_tiny_janus([_WORDS], vq.eval(), side=4, **shape).save_official(folder, torch.float32)


def _tiny_vq():
    import torch

    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer

    torch.manual_seed(0)
    return VQTokenizer(VQConfig(32, (1, 1, 1, 1), 1, 32, codebook_size=64, codebook_dim=8))


def _of_classes(family: str) -> SoakModel:
    """A family of ImageNet, on twenty classes of shapes: 6x6 codes of 4 pixels."""

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
    "llamagen": SoakModel("train_llamagen.py", "shapes-iclr2026", _llamagen, _scenes),
    "janus": SoakModel("train_janus.py", "shapes-janus-lora", _janus, _scenes, "somebody/model"),
    "open_magvit2": _of_classes("open_magvit2"),
    "rar": _of_classes("rar"),
}
"""Janus trains adapters and its image layers, the others every weight."""

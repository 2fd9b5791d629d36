"""Recipes for Janus-Pro.

From its report (arXiv 2501.17811, table 2, stage III): AdamW with betas (0.9, 0.95), no weight
decay, clipping at 1.0, batch 128, learning rate 4e-5 for full training; no dropout. No learning
rates are published for adapters and codec: the usual ones for LoRA and those of our LlamaGen
recipes are used.
"""

from dataclasses import replace
from typing import Literal

from t2i.tensorar import presets
from t2i.training.config import BackboneOptions, DataOptions, OptimOptions, TrainConfig
from t2i.training.recipes import (
    OWN_PICTURES,
    Recipes,
    bf16,
    in_own_folders,
    on_two_cores,
    small_data,
)
from t2i.tuning import LoRAConfig

_LIGHT_DRAFTS = presets.tuned()
_MICRO_BATCHES = {"1B": 8, "7B": 4}
"""Micro-batch size by published size."""


def recipes() -> Recipes:
    """Recipes by name; any option can be overridden on the command line."""
    found: Recipes = {}
    for size in _MICRO_BATCHES:
        name, about, lora = f"janus-pro-{size.lower()}", f"Janus-Pro {size}", _lora(size)
        adapters = "LoRA on the language model"
        few = f"a few thousand pictures on one GPU: {adapters}, own drafts"
        found[f"{name}-small-data"] = (f"{about}, {few}", small_data(lora))
        for end, method, words in (
            ("lora", _LIGHT_DRAFTS, f"{adapters}, image layers trained whole, light drafts"),
            ("iclr2026", presets.iclr2026(), f"as {name}-lora with the ICLR 2026 method"),
            ("control", presets.base(), "LoRA and image layers, fine-tuned as usual"),
        ):
            found[f"{name}-{end}"] = (f"{about}, {words}", replace(lora, method=method))
    words = "Janus-Pro 7B as a whole, weights sharded over 8 GPUs, light drafts"
    found["janus-pro-1b-full"] = ("Janus-Pro 1B as a whole, light drafts", _whole("1B", 2))
    found["janus-pro-7b-full-zero3"] = (words, _whole("7B", 3))
    return in_own_folders(found | _shapes_recipes())


def _lora(size: str) -> TrainConfig:
    """LoRA on the language model and full training of the image layers, at 384 px, from the hub's
    copy in transformers' layout, without the understanding tower.
    """
    weights = f"deepseek-community/Janus-Pro-{size}"
    return TrainConfig(
        backbone=BackboneOptions(family="janus", weights=weights, generation_only=True),
        method=_LIGHT_DRAFTS,
        tuning="lora",
        train_image_layers=True,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-4, warmup_steps=None, weight_decay=0.0),
        engine=bf16(_MICRO_BATCHES[size], zero_stage=1),
        log=OWN_PICTURES,
        batch_size=128,
        token_dropout=0.0,
    )


def _whole(size: str, zero_stage: Literal[2, 3]) -> TrainConfig:
    lora = _lora(size)
    return replace(
        lora,
        tuning="full",
        train_image_layers=False,
        optim=replace(lora.optim, backbone_lr=4e-5),
        engine=replace(lora.engine, zero_stage=zero_stage),
    )


def _shapes_recipes() -> Recipes:
    """Recipes for the shipped tiny Janus on the offline shapes world."""
    lora = on_two_cores(
        TrainConfig(
            backbone=BackboneOptions(family="janus", weights="shapes-janus"),
            method=_LIGHT_DRAFTS,
            tuning="lora",
            lora=LoRAConfig(rank=16, alpha=32.0),
            train_image_layers=True,
            data=DataOptions(source="shapes", validation_samples=256),
            optim=OptimOptions(codec_lr=3e-3, backbone_lr=1e-3, warmup_steps=20, weight_decay=0.0),
        )
    )
    own_pictures = replace(lora, data=DataOptions(), log=OWN_PICTURES, steps=None)
    tiny = "offline shapes world, tiny Janus"
    return {
        "shapes-janus-lora": (
            f"{tiny}: LoRA, image layers trained whole, light drafts",
            lora,
        ),
        "shapes-janus-full": (
            f"{tiny} as a whole, light drafts",
            replace(lora, tuning="full", train_image_layers=False),
        ),
        "shapes-janus-small-data": (
            "the small-data recipe on the offline tiny Janus, for your own pictures at 64 px on "
            "two cores",
            small_data(own_pictures),
        ),
        "shapes-janus-control": (
            f"{tiny}: LoRA and image layers, fine-tuned as usual",
            replace(lora, method=presets.base()),
        ),
    }

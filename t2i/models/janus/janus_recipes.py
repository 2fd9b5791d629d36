"""Named starting points for Janus-Pro.

From its report (arXiv 2501.17811, table 2, stage III): AdamW with betas (0.9, 0.95), no weight
decay, clipping at 1.0, batch 128, rate 4e-5 for full training; no dropout. The rates of adapters
and codec are the usual ones for LoRA and those of our LlamaGen recipes: nobody has published any.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.recipes import OWN_PICTURES, Recipes, on_two_cores, small_data
from t2i.tuning import LoRAConfig


def recipes() -> Recipes:
    """By name; every option can be changed on the command line."""
    found: Recipes = {}
    for size in ("1B", "7B"):
        name, about = f"janus-pro-{size.lower()}", f"Janus-Pro {size}"
        found |= {
            f"{name}-small-data": (
                f"{about}, a few thousand pictures on one GPU: LoRA on the language model, own "
                "drafts",
                small_data(_lora(size, _LIGHT_DRAFTS), f"{name}-small-data"),
            ),
            f"{name}-lora": (
                f"{about}, LoRA on the language model, image layers trained whole, light drafts",
                _lora(size, _LIGHT_DRAFTS),
            ),
            f"{name}-iclr2026": (
                f"{about}, as {name}-lora with the ICLR 2026 method",
                _lora(size, presets.iclr2026()),
            ),
            f"{name}-control": (
                f"{about}, LoRA and image layers, fine-tuned as usual",
                _lora(size, presets.base()),
            ),
        }
    found["janus-pro-1b-full"] = (
        "Janus-Pro 1B as a whole, light drafts",
        _janus_pro("1B", _LIGHT_DRAFTS, 4e-5, _bf16(8, 2)),
    )
    found["janus-pro-7b-full-zero3"] = (
        "Janus-Pro 7B as a whole, weights sharded over 8 GPUs, light drafts",
        _janus_pro("7B", _LIGHT_DRAFTS, 4e-5, _bf16(4, 3)),
    )
    return found | _shapes_recipes()


def _shapes_recipes() -> Recipes:
    tiny = "offline shapes world, tiny Janus"
    own_pictures = _shapes_janus(_LIGHT_DRAFTS, data=DataOptions(), log=OWN_PICTURES, steps=None)
    return {
        "shapes-janus-lora": (
            f"{tiny}: LoRA, image layers, ICLR 2026 method with light drafts",
            _shapes_janus(_LIGHT_DRAFTS),
        ),
        "shapes-janus-full": (
            f"{tiny} as a whole, ICLR 2026 method with light drafts",
            _shapes_janus(_LIGHT_DRAFTS, tuning="full", train_image_layers=False),
        ),
        "shapes-janus-small-data": (
            "the small-data recipe on the offline tiny Janus, for your own pictures at 64 px on "
            "two cores",
            small_data(own_pictures, "shapes-janus-small-data"),
        ),
        "shapes-janus-control": (
            f"{tiny}: LoRA and image layers, fine-tuned as usual",
            _shapes_janus(presets.base()),
        ),
    }


_LIGHT_DRAFTS = presets.tuned()


def _janus_pro(
    size: str, method: TensorARConfig, backbone_lr: float, engine: EngineOptions, **changes
) -> TrainConfig:
    """Janus-Pro at 384 px by transformers' copy on the hub, without its understanding tower."""
    config = TrainConfig(
        run_dir=Path(f"runs/janus-pro-{size.lower()}"),
        backbone=BackboneOptions(
            family="janus",
            weights=f"deepseek-community/Janus-Pro-{size}",
            generation_only=True,
        ),
        method=method,
        optim=OptimOptions(
            codec_lr=1e-4, backbone_lr=backbone_lr, warmup_steps=None, weight_decay=0.0
        ),
        engine=engine,
        log=OWN_PICTURES,
        batch_size=128,
        token_dropout=0.0,
    )
    return replace(config, **changes)


def _bf16(micro_batch: int, zero_stage: Literal[1, 2, 3]) -> EngineOptions:
    return EngineOptions(
        zero_stage=zero_stage,
        precision="bf16",
        micro_batch=micro_batch,
        gradient_checkpointing=True,
    )


def _lora(size: str, method: TensorARConfig) -> TrainConfig:
    """Adapters on the language model, image layers trained whole."""
    engine = _bf16(8 if size == "1B" else 4, 1)
    return _janus_pro(size, method, 1e-4, engine, tuning="lora", train_image_layers=True)


def _shapes_janus(method: TensorARConfig, **changes) -> TrainConfig:
    """The shipped tiny Janus on the offline shapes world."""
    config = TrainConfig(
        run_dir=Path("runs/shapes-janus"),
        backbone=BackboneOptions(family="janus", weights="shapes-janus"),
        method=method,
        tuning="lora",
        lora=LoRAConfig(rank=16, alpha=32.0),
        train_image_layers=True,
        data=DataOptions(source="shapes", validation_samples=256),
        optim=OptimOptions(codec_lr=3e-3, backbone_lr=1e-3, warmup_steps=20, weight_decay=0.0),
    )
    return replace(on_two_cores(config), **changes)

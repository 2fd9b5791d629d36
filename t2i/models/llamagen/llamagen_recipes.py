"""Named starting points for LlamaGen text-to-image, and for the offline shapes world.

`tuned` is what our own evidence recommends (docs/recipe.md): level with the control where both
published methods fall below it. Runs of more than some 400 steps should train on own drafts alone,
and so does `small-data`. Rates of the real sizes are not measured: those of adapters are the usual
ones for LoRA, the others a tenth of pre-training's.
"""

from dataclasses import replace
from pathlib import Path

from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)

OWN_PICTURES = LogOptions(
    log_every=None,
    validate_every=None,
    sample_every=None,
    save_every=None,
    at_start=True,
    prompts=(),
)
"""Everything by the run's length, and sheets of the captions of held-out pictures."""


def small_data(config: TrainConfig, name: str) -> TrainConfig:
    """A recipe for some hundred to some thousand pictures on one GPU: adapters and codec, ten
    passes in small batches.
    """
    return replace(
        config,
        run_dir=Path(f"runs/{name}"),
        method=presets.tuned(own_drafts=1.0),
        tuning="lora",
        train_image_layers=False,
        optim=replace(config.optim, codec_lr=3e-4, backbone_lr=1e-4, warmup_steps=None),
        engine=replace(config.engine, zero_stage=1),
        log=replace(config.log, keep_last=5),  # the best one need not be the last
        batch_size=32,
        epochs=10.0,
    )


def _shapes(method: TensorARConfig, codec_lr: float = 1e-3) -> TrainConfig:
    """The offline world: the shipped base, small batches, two cores. All share one backbone
    learning rate.
    """
    return TrainConfig(
        run_dir=Path("runs/shapes"),
        method=method,
        data=DataOptions(source="shapes", validation_samples=256),
        optim=OptimOptions(codec_lr=codec_lr, backbone_lr=1e-4, warmup_steps=20),
        engine=EngineOptions(micro_batch=32),
        log=LogOptions(save_every=100),
        batch_size=32,
        steps=200,
        token_dropout=0.0,
    )


def _llamagen_t2i(method: TensorARConfig, **changes) -> TrainConfig:
    """LlamaGen GPT-XL, stage 1 (256 px), with the published recipe."""
    config = TrainConfig(
        run_dir=Path("runs/llamagen-t2i"),
        backbone=BackboneOptions(
            weights="peizesun/llamagen_t2i:t2i_XL_stage1_256.pt",
            tokenizer="peizesun/llamagen_t2i:vq_ds16_t2i.pt",
            text_encoder="google/flan-t5-xl",
            text_encoder_dtype="bfloat16",
        ),
        method=method,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-5, warmup_steps=None),
        engine=EngineOptions(
            zero_stage=2, precision="bf16", micro_batch=8, gradient_checkpointing=True
        ),
        log=OWN_PICTURES,
    )
    return replace(config, **changes)


RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "shapes-iclr2026": ("offline shapes world, ICLR 2026 method", _shapes(presets.iclr2026())),
    "shapes-arxiv2505": ("offline shapes world, arXiv v1 method", _shapes(presets.arxiv2505())),
    "shapes-tuned": (
        "offline shapes world, ICLR 2026 method: light drafts, half of them its own, a faster codec",
        _shapes(presets.tuned(), codec_lr=3e-3),
    ),
    "shapes-control": (
        "offline shapes world, the base fine-tuned as usual",
        _shapes(presets.base()),
    ),
    "shapes-small-data": (
        "the small-data recipe on the offline base, for your own pictures at 64 px on two cores",
        small_data(
            replace(_shapes(presets.tuned()), data=DataOptions(), log=OWN_PICTURES, steps=None),
            "shapes-small-data",
        ),
    ),
    "t2i-xl-256-iclr2026": (
        "LlamaGen text-to-image XL at 256 px, published recipe, ICLR 2026 method",
        _llamagen_t2i(presets.iclr2026()),
    ),
    "t2i-xl-256-arxiv2505": (
        "LlamaGen text-to-image XL at 256 px, published recipe, arXiv v1 method",
        _llamagen_t2i(presets.arxiv2505()),
    ),
    "t2i-xl-256-tuned": (
        "LlamaGen text-to-image XL at 256 px, light drafts, half of them its own",
        _llamagen_t2i(presets.tuned()),
    ),
    "t2i-xl-256-control": (
        "LlamaGen text-to-image XL at 256 px, the base fine-tuned as usual",
        _llamagen_t2i(presets.base()),
    ),
    "t2i-xl-256-lora": (
        "LlamaGen text-to-image XL at 256 px, LoRA on the backbone, light drafts, half of them its own",
        _llamagen_t2i(
            presets.tuned(),
            tuning="lora",
            optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-4, warmup_steps=None),
        ),
    ),
    "t2i-xl-256-small-data": (
        "LlamaGen text-to-image XL at 256 px, a few thousand pictures on one GPU: LoRA, own drafts",
        small_data(_llamagen_t2i(presets.tuned()), "llamagen-small-data"),
    ),
}
"""Named starting points; every option can be changed on the command line."""

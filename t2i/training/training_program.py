"""What every `launch/train_*.py` does: parse a named recipe with overrides, then check it or
train.
"""

import os

from t2i import cli
from t2i.training.config import DataOptions, TrainConfig

MAIN_OPTIONS = (
    *("data.source", "data.caption_column", "data.validation_samples"),
    *("run_dir", "resume", "check", "backbone.weights", "batch_size", "epochs", "steps", "seed"),
    *("engine.micro_batch", "engine.zero_stage", "method.k", "optim.codec_lr", "optim.backbone_lr"),
    *("log.prompts", "log.sample_every", "log.save_every"),
)
"""What --help shows of a recipe."""


def run_recipe(recipes: dict[str, tuple[str, TrainConfig]], description: str) -> None:
    """Parse a named recipe with overrides, and run it."""
    run_config(cli.parse_recipe(recipes, description, main=MAIN_OPTIONS))


def run_config(config: TrainConfig) -> None:
    """Train, or print the pre-flight's report with --check. The main process alone reports."""
    if config.check:
        from t2i.training.check import check

        report = check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        if cli.is_main_process():
            print(report)
        return
    from t2i.training.loop import train

    folder = train(config)
    if cli.is_main_process():
        print(f"checkpoint: {folder}\nrun page:   {config.run_dir / 'index.html'}")
        if isinstance(config.data, DataOptions) and config.data.trigger:
            prompt = config.data.with_trigger("your prompt")
            print(f"trained with trigger words; draw with them: --prompt {prompt!r}")

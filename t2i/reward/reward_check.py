"""What `--check` reports for reward fine-tuning in addition to the report of any run. Judges are
listed, but neither loaded nor fetched.
"""

from collections.abc import Iterator
from pathlib import Path

from t2i.progress import readable_size, readable_time
from t2i.reward.reward_options import BUILT_IN, RewardConfig, RewardOptions
from t2i.reward.reward_prompts import PromptPool, training_prompts
from t2i.reward.rewards import check_judges, judging, own_function
from t2i.tensorar.model import TensorAR
from t2i.tensorar.room import cache_bytes
from t2i.training import check as training_check
from t2i.training.memory import weight_bytes
from t2i.training.run_plan import Plan
from t2i.training.start import check_start
from t2i.training.state import trained

BANDWIDTH = 2e12
"""Assumed bytes per second at which drawing reads weights: an A100's (an H100 reads 3.3e12)."""


def check(config: RewardConfig, world_size: int = 1) -> str:
    """The report as text.

    Raises:
        UserError: the run is impossible.
    """
    pool = training_prompts(config.reward, config.seed)
    reward = _reward_lines(judging(config), pool)

    def more(model: TensorAR, plan: Plan | None, checkpoint: Path | None) -> dict[str, list[str]]:
        if checkpoint is not None:
            check_start(config, checkpoint)
        lines = [*reward, *_unreadable(config.reward, pool, model)]
        return {"reward": lines, "drawing": _drawing_lines(config, model, plan, world_size)}

    def beside(model: TensorAR) -> float:
        return sum(_beside(config, model, world_size))

    return training_check.check(config, world_size, more, beside)


def _reward_lines(options: RewardOptions, pool: PromptPool) -> list[str]:
    for name in options.functions:
        if name not in BUILT_IN:
            own_function(name)
    check_judges(options, pool.every())
    counts = ", ".join(f"{len(entries)} {task}" for task, entries in pool.tasks.items())
    rewards = " + ".join(f"{w:g} x {name}" for name, w in options.weighted().items())
    return [
        f"learns from  {rewards or 'what the start draws guided; nothing is rewarded'}",
        f"prompts      {counts}; {pool.left_out} left out, which are a benchmark's",
        f"watches      {', '.join(options.watch) or 'held-out loss alone'}",
    ]


def _unreadable(options: RewardOptions, pool: PromptPool, model: TensorAR) -> Iterator[str]:
    """A line on the prompts of a user's file that have no text the encoder can read."""
    if options.prompts in ("shapes", "official"):
        return
    prompts = [entry["prompt"] for entry in pool.every()]
    notes = model.backbone.caption_notes(prompts)
    if lost := [text for text, found in zip(prompts, notes, strict=True) if found is None]:
        yield (
            f"not read     {len(lost)} of {len(prompts)} prompts have no text the encoder can read, "
            f"such as {lost[0]!r:.200}"
        )


def _images_at_once(config: RewardConfig, world_size: int) -> int:
    return min(config.reward.draw_batch, config.batch_size // world_size)


def _beside(config: RewardConfig, model: TensorAR, world_size: int) -> tuple[float, float, float]:
    """Bytes beside the model: copy of the start, cache, and what the start says of all codes.

    `model` is on the meta device, in the type it computes in.
    """
    options = config.reward
    held = cache_bytes(model, options.sampling, _images_at_once(config, world_size))
    start = weight_bytes(config) * sum(
        p.numel() for name, p in trained(model).items() if "lora_" not in name
    )
    kept = 0
    if options.teacher is not None:
        vocab = sum(model.backbone.spec.subvocabs)
        kept = 4 * config.engine.micro_batch * model.windows.tokens * vocab
        if options.updates > 1:
            kept *= config.batch_size // (config.engine.micro_batch * world_size)
    return start, held, kept


def _drawing_lines(
    config: RewardConfig, model: TensorAR, plan: Plan | None, world_size: int
) -> list[str]:
    """How images are drawn, and the memory and time it takes; `model` is on the meta device."""
    options, images = config.reward, _images_at_once(config, world_size)
    start, held, kept = _beside(config, model, world_size)
    weights = weight_bytes(config) * sum(p.numel() for p in model.parameters())
    lines = [
        f"{config.batch_size} images per step = {config.prompts_per_step} prompts x "
        f"{options.group} images, {images} at once in each process"
        + (f", guided by {options.cfg_scale:g}" if options.cfg_scale != 1 else ", unguided"),
        f"{'copy of the start':<34}{readable_size(start)}, beside the model",
        f"{'cache while drawing':<34}{readable_size(held)}, kept from step to step",
    ]
    if (teacher := options.teacher) is not None:
        lines.append(
            f"{'what the start says of all codes':<34}{readable_size(kept)}, guided by "
            f"{teacher.cfg_scale:g} at temperature {teacher.temperature:g}"
        )
    if plan is not None:
        batches = -(-config.batch_size // (world_size * images)) * plan.steps
        seconds = batches * model.windows.count * weights / BANDWIDTH
        lines.append(
            f"{batches:,} batches of {model.windows.count} calls that read {readable_size(weights)}"
            f" each: {readable_time(seconds)} at least at {BANDWIDTH / 1e12:g} TB/s (estimated)"
        )
    return lines

"""What a resumed run may do otherwise: every option is in a group, by its or its part's name."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from t2i.errors import UserError
from t2i.training.config import TrainConfig
from t2i.training.engine import deepspeed_config

log = logging.getLogger(__name__)

MUST_MATCH = (
    "method",
    "tuning",
    "lora",
    "train_image_layers",
    "backbone",
    "batch_size",
    "seed",
    "data",
    "condition_dropout",
    "token_dropout",
    "ema",
    "reward",
)
"""With another value the run would be another one."""
ROUNDING = ("engine.zero_stage", "engine.precision", "engine.micro_batch", "engine.compile")
"""May change, as the number of processes may: the same sums, added or rounded otherwise."""
BY_CONTENT = (
    "data.source",
    "backbone.weights",
    "backbone.tokenizer",
    "backbone.text_encoder",
    "engine.deepspeed_config",
)
"""Names of files, which may have moved: what is in them is compared, not where they are."""
APPLIED = ("optim", "steps", "epochs", "sampling")
"""May change for a reason, but not unnoticed; the new value holds from the next step on."""
FREE = (
    *("run_dir", "log", "resume", "check", "data.cache_dir"),
    *("engine.gradient_checkpointing", "engine.codec_checkpointing"),
    *("reward.seconds", "reward.constant", "reward.workers"),
    *("reward.watch", "reward.watch_prompts", "reward.watch_images"),
    *("reward.detector_weights", "reward.answerer_weights"),
)
"""Nothing that is computed depends on them."""


def plain(value):
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def options(config: dict, part: str = "") -> Iterator[tuple[str, object]]:
    """Every option of a `plain` config by its full name, such as "optim.betas"."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from options(value, f"{part}{name}.")
        else:
            yield part + name, value


def group_of(name: str) -> tuple[str, ...]:
    """The group of an option: that of its own name, else of its part's."""
    groups = (ROUNDING, BY_CONTENT, FREE, APPLIED, MUST_MATCH)
    for known in (name, name.partition(".")[0]):
        for group in groups:
            if known in group:
                return group
    raise AssertionError(f"{name} belongs to none of the groups of {__name__}")


def check_settings(config: TrainConfig, stored: dict, where: Path) -> None:
    """UserError if a setting differs without which the run is another one; a warning for those that
    may be changed.

    `stored` may lack options that it was written before.
    """
    before = dict(options(stored))
    changed = {
        name: f"{name}: {before[name]} -> {value}"
        for name, value in options(plain(asdict(config)))
        if name in before and before[name] != value
    }
    if others := [text for name, text in changed.items() if group_of(name) is MUST_MATCH]:
        raise UserError(
            f"cannot resume {where} with other settings ({'; '.join(others)}); start a new run_dir"
        )
    if allowed := [text for name, text in changed.items() if group_of(name) is APPLIED]:
        log.warning("resuming %s with changed settings: %s", where, "; ".join(allowed))


def state_facts(config: TrainConfig, world_size: int) -> dict:
    """What the bits of a run depend on besides its settings, for `say_what_differs`."""
    own = dict(options(plain(asdict(config))))
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    return {
        "world_size": world_size,
        **{name: own[name] for name in ROUNDING},
        **{f"zero_optimization.{name}": value for name, value in options(plain(zero))},
    }


def say_what_differs(config: TrainConfig, world_size: int, stored: dict, where: Path) -> None:
    """A warning if other processes, or another engine, go on from a checkpoint."""
    before, now = stored.get("state") or {}, state_facts(config, world_size)
    if changes := [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]:
        log.warning(
            "resuming %s with %s: the same samples in the same order, and not bit for bit the same "
            "numbers",
            where,
            "; ".join(changes),
        )

"""What a resumed run may do otherwise: the options in these groups, by their or their part's name.

With another value of any other option the run would be another one.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from t2i.errors import UserError
from t2i.fields import leaves
from t2i.training.config import TrainConfig
from t2i.training.engine import deepspeed_config

log = logging.getLogger(__name__)

ROUNDING = ("engine.zero_stage", "engine.precision", "engine.micro_batch", "engine.compile")
"""May change, as the number of processes may: the same sums, added or rounded otherwise."""
APPLIED = ("optim", "steps", "epochs", "sampling")
"""May change for a reason, but not unnoticed; the new value holds from the next step on."""
FREE = (
    *("run_dir", "log", "resume", "check", "data.cache_dir"),
    *("engine.gradient_checkpointing", "engine.codec_checkpointing"),
    *("reward.seconds", "reward.constant", "reward.workers"),
    *("reward.watch", "reward.watch_prompts", "reward.watch_images"),
    *("reward.detector_weights", "reward.answerer_weights"),
    # Names of files, which may have moved: what is in them is compared, not where they are.
    *("data.source", "backbone.weights", "backbone.tokenizer", "backbone.text_encoder"),
    "engine.deepspeed_config",
)
"""May change without a word: nothing that is computed depends on them, but for the DeepSpeed file,
which `say_what_differs` compares.
"""


def settings_of(config: TrainConfig, caller: str) -> TrainConfig:
    """What a function that a notebook calls was given; UserError if it is no run's settings."""
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{caller} takes the settings of a run, and {config!r:.80} is none: "
            f"{caller}(t2i.recipe('shapes-control', {{'steps': 20}}))"
        )
    return config


def plain(config: TrainConfig) -> dict:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(asdict(config), default=str))


def _in(group: tuple[str, ...], name: str) -> bool:
    return name in group or name.partition(".")[0] in group


def check_settings(config: TrainConfig, stored: dict, where: Path) -> None:
    """UserError if a setting differs without which the run is another one; a warning for those that
    may be changed.

    `stored` may lack options that it was written before.
    """
    before = leaves(stored)
    changed = {
        name: f"{name}: {before[name]} -> {value}"
        for name, value in leaves(plain(config)).items()
        if name in before and before[name] != value and not _in(FREE + ROUNDING, name)
    }
    if others := [text for name, text in changed.items() if not _in(APPLIED, name)]:
        raise UserError(
            f"cannot resume {where} with other settings ({'; '.join(others)}); start a new run_dir"
        )
    began, weights = before.get("backbone.weights"), config.backbone.weights
    if weights != began and not Path(weights).exists():  # of a file here the hash is compared
        log.warning(
            "resuming %s with its own weights, which began as %s, and not with %s",
            *(where, began, weights),
        )
    if changed:
        log.warning("resuming %s with changed settings: %s", where, "; ".join(changed.values()))


def state_facts(config: TrainConfig, world_size: int) -> dict:
    """What the bits of a run depend on besides its settings, for `say_what_differs`."""
    own = leaves(plain(config))
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    return {
        "world_size": world_size,
        **{name: own[name] for name in ROUNDING},
        **{f"zero_optimization.{name}": value for name, value in leaves(zero).items()},
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

"""Which settings a resumed run may change, as groups of names of options or of parts.

A change of any other option would make it a different run, and is refused.
"""

import logging
import os
from pathlib import Path

from t2i import __version__
from t2i.errors import UserError, shorten
from t2i.fields import leaves, plain
from t2i.processes import Processes
from t2i.training.config import TrainConfig
from t2i.training.engine import deepspeed_config
from t2i.training.start import local_base

log = logging.getLogger(__name__)

ROUNDING = ("engine.zero_stage", "engine.precision", "engine.micro_batch", "engine.compile")
"""May change, like the number of processes: they affect only rounding, and which numbers dropout
draws. A change is warned of.
"""
APPLIED = ("optim", "steps", "epochs", "sampling")
"""May change with a warning; the new value applies from the next step on."""
FREE = (
    *("run_dir", "log", "resume", "check", "data.cache_dir"),
    *("engine.gradient_checkpointing", "engine.codec_checkpointing"),
    *("reward.seconds", "reward.constant", "reward.workers"),
    *("reward.watch", "reward.watch_prompts", "reward.watch_images"),
    *("reward.detector_weights", "reward.answerer_weights"),
    # Files, which may have moved: their content is compared, not their place.
    *("data.source", "backbone.weights", "backbone.tokenizer", "backbone.text_encoder"),
    "engine.deepspeed_config",
)
"""May change silently: results do not depend on them. (The content of the DeepSpeed file matters,
and `warn_of_rounding` compares it.)
"""
RECORDED = ("plan", "sheet_prompts")
"""What a run's config.json holds besides its settings."""


def settings_of(config: TrainConfig, caller: str) -> TrainConfig:
    """What a function that a notebook calls was given; UserError if it is no run's settings."""
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{caller} takes the settings of a run, and {config!r:.80} is none: "
            f"{caller}(t2i.recipe('shapes-control', {{'steps': 20}}))"
        )
    return config


_OWN_PLACES = ("run_dir", "data.cache_dir")
"""Options that may be other paths on other machines, also before anything is there."""


def refuse_different(config: TrainConfig, processes: Processes) -> None:
    """UserError if the processes were started with different options, as happens when the command
    is edited on one of several machines. Paths may differ. All processes must call it.
    """
    everywhere = processes.gather(
        {
            name: value
            for name, value in leaves(plain(config)).items()
            if name not in _OWN_PLACES and not any(map(_is_place, _listed(value)))
        }
    )
    first = everywhere[0]
    for rank, found in enumerate(everywhere):
        told = [f"{k}: {first[k]} and {v}" for k, v in found.items() if first.get(k, v) != v]
        if told:
            raise UserError(
                f"processes 0 and {rank} were started with different options ({shorten(told)}); "
                "give the same command on all machines"
            )


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _is_place(value: object) -> bool:
    return isinstance(value, str) and os.path.exists(value)


def _in(group: tuple[str, ...], name: str) -> bool:
    return name in group or name.partition(".")[0] in group


def check_settings(config: TrainConfig, stored: dict, where: Path) -> None:
    """UserError if a setting differs that must not change; a warning for those in `APPLIED`.

    `stored` may lack options that are newer than the run.
    """
    own = plain(config)
    if ("reward" in stored) != ("reward" in own):
        taught = ("the images that it draws", "data")
        was, would = taught if "reward" in stored else reversed(taught)
        raise UserError(
            f"cannot resume {where}: that run learns from {was}, and this program's learn from "
            f"{would}; use the program that began it, or start a new run_dir from its weights, with "
            "--backbone.weights"
        )
    before, now = leaves(stored), leaves(own)
    changed = {
        name: f"{name}: {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and before[name] != value and not _in(FREE + ROUNDING, name)
    }
    if others := [text for name, text in changed.items() if not _in(APPLIED, name)]:
        raise UserError(
            f"cannot resume {where} with other settings ({'; '.join(others)}): repeat the options "
            "that the run began with, or start a new run_dir"
        )
    began, weights = before.get("backbone.weights"), config.backbone.weights
    compared = "reward" in own or local_base(weights) is not None  # by content, when they are read
    if weights != began and not compared:
        log.warning(
            "resuming %s with its own weights, which began as %s, not with %s",
            *(where, began, weights),
        )
    if changed:
        log.warning("resuming %s with changed settings: %s", where, "; ".join(changed.values()))
    if unknown := [
        f"{name}={value}"
        for name, value in before.items()
        if name not in now and not _in((*FREE, *RECORDED), name)
    ]:
        log.warning(
            "resuming %s without settings that this version (%s) of the kit does not know: %s",
            *(where, __version__, ", ".join(unknown)),
        )


def state_facts(config: TrainConfig, world_size: int) -> dict:
    """What the rounding of a run's numbers depends on, to be stored for `warn_of_rounding`."""
    own = leaves(plain(config))
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    return {
        "world_size": world_size,
        **{name: own[name] for name in ROUNDING},
        **{f"zero_optimization.{name}": value for name, value in leaves(zero).items()},
    }


def warn_of_rounding(config: TrainConfig, world_size: int, stored: dict, where: Path) -> None:
    """Warn if a run is resumed with another number of processes or other engine settings."""
    before, now = stored.get("state") or {}, state_facts(config, world_size)
    if changes := [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]:
        log.warning(
            "resuming %s with %s: the same samples in the same order, but the numbers will not be "
            "bit for bit the same",
            where,
            "; ".join(changes),
        )

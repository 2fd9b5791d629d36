"""The trigger words that a model was trained with, for those who draw with it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from t2i.checkpoint_folders import read_config
from t2i.training.config import DataOptions

log = logging.getLogger(__name__)

TRIGGER = "trigger"
"""Among the facts of an export, whose run is not stored."""


def trigger_of(training: dict) -> str | None:
    """The trigger words in a checkpoint's facts about its training, or an export's."""
    of_run = training.get("config", {}).get("data", {}).get("trigger")
    return of_run or training.get(TRIGGER)


def with_trigger(training: dict, prompt: str) -> str:
    """A prompt with the trigger words that a checkpoint was trained with."""
    return DataOptions(trigger=trigger_of(training)).with_trigger(prompt)


def remind_of_trigger(checkpoint: Path | None, prompts: Sequence[str]) -> None:
    """Say, once, that prompts lack the words."""
    if lacking := without_trigger(checkpoint, prompts):
        log.warning(lacking)


def without_trigger(checkpoint: Path | None, prompts: Sequence[str]) -> str:
    """What to say of prompts that lack the words; "": nothing, and of a base by itself (None)."""
    if checkpoint is None:
        return ""
    training = read_config(checkpoint)["training"]
    typed = {prompt: with_trigger(training, prompt) for prompt in prompts}
    lacking = [prompt for prompt, full in typed.items() if full != prompt]
    if not lacking:
        return ""
    others = "" if len(lacking) == 1 else f" (and {len(lacking) - 1} more)"
    return (
        f"{lacking[0]!r:.200}{others} lacks the trigger words of training: "
        f"{typed[lacking[0]]!r:.300} has them"
    )

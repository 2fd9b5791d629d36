"""The trigger words that a model is trained with: check that it can read them, and remind users who
draw with it.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.checkpoint_folders import read_config
from t2i.errors import UserError, naming
from t2i.training.config import DataOptions

if TYPE_CHECKING:
    from t2i.models.base import Backbone

log = logging.getLogger(__name__)

TRIGGER = "trigger"
"""Key of the words in an export, which does not store the run's settings."""


def refuse_lost_words(backbone: "Backbone", options: DataOptions) -> None:
    """UserError for trigger words that never reach the text encoder: LlamaGen's caption cleaning
    removes some words, and training on them would have no effect.
    """
    if options.trigger is None:
        return
    read = _words(backbone.as_read(options.with_trigger("a picture")))
    if lost := [word for word in _words(options.with_trigger("")) if word not in read]:
        raise UserError(
            f"data.trigger={options.trigger!r}: this {backbone.spec.family} model's cleaning of "
            f"captions takes {', '.join(map(repr, lost))} out, so its text encoder would never read "
            "it. Use plain words of Latin letters, made up or not ('drawn by xyz'): letters mixed "
            "with digits, @names, <tags>, file types and Chinese may be removed"
        )


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def trigger_of(training: dict) -> str | None:
    """The trigger words in what a checkpoint or an export stores about its training."""
    return run_settings(training).get("data", {}).get("trigger") or training.get(TRIGGER)


def run_settings(training: dict) -> dict:
    """The settings of the run that wrote these facts; empty if none did: users' own facts
    (`t2i.save_pretrained`) may have a "config" as well.
    """
    run = training.get("config")
    parts = ("data", "optim", "engine", "lora", "reward")
    if isinstance(run, dict) and all(isinstance(run.get(part, {}), dict) for part in parts):
        return run
    return {}


def with_trigger(training: dict, prompt: str) -> str:
    """A prompt with the trigger words that a checkpoint was trained with."""
    return DataOptions(trigger=trigger_of(training)).with_trigger(prompt)


def remind_of_trigger(checkpoint: Path | None, prompts: Sequence[str]) -> None:
    """Log a warning if prompts lack the trigger words."""
    if lacking := without_trigger(checkpoint, prompts):
        log.warning(lacking)


def without_trigger(checkpoint: Path | None, prompts: Sequence[str]) -> str:
    """A warning about prompts that lack the trigger words; "" if none do, or for no checkpoint."""
    if checkpoint is None:
        return ""
    training = read_config(checkpoint)["training"]
    with naming(f"{checkpoint}/config.json"):
        words = DataOptions(trigger=trigger_of(training))
    typed = {prompt: words.with_trigger(prompt) for prompt in prompts}
    lacking = [prompt for prompt, full in typed.items() if full != prompt]
    if not lacking:
        return ""
    others = "" if len(lacking) == 1 else f" (and {len(lacking) - 1} more)"
    return (
        f"{lacking[0]!r:.200}{others} lacks the trigger words of training: "
        f"{typed[lacking[0]]!r:.300} has them"
    )

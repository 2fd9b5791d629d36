"""The trigger words that a model is trained with: whether it reads them, and what those who draw
with it are told.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.checkpoint_folders import read_config
from t2i.errors import UserError
from t2i.training.config import DataOptions

if TYPE_CHECKING:
    from t2i.models.base import Backbone

log = logging.getLogger(__name__)

TRIGGER = "trigger"
"""Among the facts of an export, whose run is not stored."""


def refuse_lost_words(backbone: "Backbone", options: DataOptions) -> None:
    """UserError names the trigger words that never get to the text encoder: LlamaGen's cleaning of
    captions takes whole words out, and the run would teach, and be drawn with, nothing.
    """
    if options.trigger is None:
        return
    read = _words(backbone.as_read(options.with_trigger("a picture")))
    if lost := [word for word in _words(options.with_trigger("")) if word not in read]:
        raise UserError(
            f"data.trigger={options.trigger!r}: the cleaning of captions that this "
            f"{backbone.spec.family} model was trained with takes {', '.join(map(repr, lost))} out, "
            "so that its text encoder would never read it. Plain words of Latin letters stay, made "
            "up or not ('drawn by xyz'); letters mixed with digits, @names, <tags>, file types and "
            "Chinese may go"
        )


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


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

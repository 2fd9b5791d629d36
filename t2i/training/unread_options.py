"""Options that a run does not read beside its other settings: pointed out, and refused where the
run would be another one than was asked for.

What a recipe says is nobody's wish: only what differs from it, and from the option's own default,
was given.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from t2i.checkpoint_folders import is_checkpoint
from t2i.errors import UserError
from t2i.fields import given_options, leaves
from t2i.training.config import LabelledOptions, TrainConfig
from t2i.training.open_data import holds_codes
from t2i.training.settings import plain

log = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainConfig)
_Unread = Iterator[tuple[set[str], str]]
"""Options that are not read, and beside which setting."""


def settle_options(config: C, recipe: C) -> C:
    """What is run when this was made of a recipe: epochs that are given alone count, and not the
    recipe's steps.

    Raises:
        UserError: names options which the run would not read, and would be another one without.
    """
    before, now = leaves(plain(recipe)), leaves(plain(config))
    given = [name for name in given_options(config) if now.get(name) != before.get(name)]
    for told in _told(given, now, _contradicted(config, given)):
        raise UserError(f"{told}; leave it out")
    if "epochs" in given and config.steps == recipe.steps:
        config = replace(config, steps=None)
    for told in _told(given, now, _idle(config)):
        log.warning(told)
    return config


def _told(given: list[str], values: dict, unread: _Unread) -> Iterator[str]:
    for names, why in unread:
        if parts := [f"{name}={values[name]}" for name in given if name in names]:
            yield f"{', '.join(parts)} has no effect with {why}"


def _contradicted(config: TrainConfig, given: list[str]) -> _Unread:
    data, of_base = config.data, {"backbone.grid", "backbone.text_encoder_dtype"}
    if of_base & {*given} and is_checkpoint(config.backbone.weights):  # which reads all of it
        yield of_base, f"backbone.weights={config.backbone.weights}, which says it itself"
    if isinstance(data, LabelledOptions) and any(map(holds_codes, data.source)):
        yield {"data.views", "data.crop_ranges", "data.split"}, "codes that others computed"
    elif isinstance(data, LabelledOptions) and data.views == "flip":
        yield {"data.crop_ranges"}, "data.views=flip (ten-crop reads it)"


def _idle(config: TrainConfig) -> _Unread:
    """Scripts give all options to every recipe, and the control gets those of drafts, too."""
    if config.method.k == 1:
        of_method = {f"method.{name}" for name in vars(config.method)} - {"method.k"}
        drafts = {"sampling.draft_temperature", "sampling.renoise"}
        codec = {"optim.codec_lr", "engine.codec_checkpointing"}
        yield of_method | drafts | codec, "method.k=1, which is the base without TensorAR"
    if config.tuning == "codec" and not config.train_image_layers:
        of_backbone = ("backbone_lr", "backbone_delay_steps", "backbone_falls")
        yield {f"optim.{name}" for name in of_backbone}, "tuning=codec"
    if config.steps is not None:
        yield {"epochs"}, f"steps={config.steps}"
    if config.log.tracker != "wandb":
        yield {"log.project"}, f"log.tracker={config.log.tracker} (it is wandb's)"

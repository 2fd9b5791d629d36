"""Options that have no effect with a run's other settings: a warning, or a refusal if the run would
not be what the user asked for.

Only options that differ from both the recipe and their own default count as given by the user.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from t2i.checkpoint_folders import is_checkpoint
from t2i.errors import UserError
from t2i.fields import given_options, leaves, plain
from t2i.models.families import find_family
from t2i.sampling import SamplingConfig
from t2i.training.config import LabelledOptions, TrainConfig, Unread
from t2i.training.open_data import holds_codes

log = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainConfig)


def settle_options(config: C, recipe: C) -> C:
    """The settings to run, given those made from a recipe: if only epochs were given, they replace
    the recipe's steps. Warns of options without effect.

    Raises:
        UserError: an option has no effect, and the user probably expects one.
    """
    before, now = leaves(plain(recipe)), leaves(plain(config))
    given = [name for name in given_options(config) if now.get(name) != before.get(name)]
    for text in _without_effect(given, now, _refused(config, given)):
        raise UserError(f"{text}; leave it out")
    if "epochs" in given and config.steps == recipe.steps:
        config = replace(config, steps=None)
    for text in _without_effect(given, now, _warned_of(config)):
        log.warning(text)
    return config


def _without_effect(given: list[str], values: dict, unread: Unread) -> Iterator[str]:
    """A message for each group of unread options of which the user gave some."""
    for names, why in unread:
        if parts := [f"{name}={values[name]}" for name in given if name in names]:
            yield f"{', '.join(parts)} has no effect with {why}"


def _refused(config: TrainConfig, given: list[str]) -> Unread:
    data, of_base = config.data, {"backbone.grid", "backbone.text_encoder_dtype"}
    if of_base & {*given} and is_checkpoint(config.backbone.weights):  # last: may hash files
        yield of_base, f"backbone.weights={config.backbone.weights}, which has its own"
    family = config.backbone.family
    if find_family(family).text_encoder is None or isinstance(data, LabelledOptions):
        no_encoder = f"backbone.family={family} here, which has no caption encoder"
        yield {"backbone.text_encoder_dtype"}, no_encoder
    if isinstance(data, LabelledOptions) and any(map(holds_codes, data.source)):
        yield {"data.views", "data.crop_ranges", "data.split"}, "pretokenized codes"
    elif isinstance(data, LabelledOptions) and data.views == "flip":
        yield {"data.crop_ranges"}, "data.views=flip (only ten-crop uses it)"


def _warned_of(config: TrainConfig) -> Unread:
    """Not refused, since scripts pass the same options to every recipe, including the control's."""
    if config.method.k == 1:
        of_method = {f"method.{name}" for name in vars(config.method)} - {"method.k"}
        drafts = {"sampling.draft_temperature", "sampling.renoise"}
        codec = {"optim.codec_lr", "engine.codec_checkpointing"}
        yield of_method | drafts | codec, "method.k=1, which is the base without TensorAR"
    else:
        yield from _of_drafts(config)
    if config.tuning == "codec" and not config.train_image_layers:
        of_backbone = ("backbone_lr", "backbone_delay_steps", "backbone_falls")
        yield {f"optim.{name}" for name in of_backbone}, "tuning=codec"
    if config.steps is not None:
        yield {"epochs"}, f"steps={config.steps}"
    if config.log.sample_every == 0:
        yield {"log.prompts"}, "log.sample_every=0, which draws no sheets"
    if config.log.tracker != "wandb":
        yield {"log.project"}, f"log.tracker={config.log.tracker} (only wandb uses it)"
    yield from config.unread()


def _of_drafts(config: TrainConfig) -> Unread:
    method = config.method
    if len(method.slot_weights) > (k := method.k):
        yield {"method.slot_weights"}, f"method.k={k} beyond its first {k} weights"
    if config.learns_from_data and method.own_drafts == 0:
        yield {"method.anneal"}, "method.own_drafts=0"
    renoise = config.sampling.apply(SamplingConfig()).renoise  # it follows the schedule
    if method.noise == "gaussian" and not renoise:
        equal = "method.noise=gaussian, which is equally strong in all drafts"
        yield {"method.schedule", "method.noise_floor"}, equal

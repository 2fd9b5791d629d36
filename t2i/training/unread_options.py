"""Options that a run would not read beside its other settings: refused where somebody gave them.
Rates of what is not trained are only pointed out: a script may give all of them to every recipe.

What a recipe says is nobody's wish: only what differs from it, and from the option's own default,
was given.
"""

import logging
from collections.abc import Iterator

from t2i.checkpoint_folders import is_checkpoint
from t2i.errors import UserError
from t2i.fields import given_options, leaves
from t2i.training.config import LabelledOptions, TrainConfig
from t2i.training.open_data import holds_codes
from t2i.training.settings import plain

log = logging.getLogger(__name__)

_Unread = Iterator[tuple[set[str], str]]
"""Options that are not read, and beside which setting."""


def refuse_unread(config: TrainConfig, recipe: TrainConfig) -> None:
    """UserError that names the options which the run, made from the recipe, would not read."""
    before, now = leaves(plain(recipe)), leaves(plain(config))
    given = [name for name in given_options(config) if now.get(name) != before.get(name)]
    for told in _told(given, now, _unread(config)):
        raise UserError(f"{told}; leave it out")
    for told in _told(given, now, _idle_rates(config)):
        log.warning(told)


def _told(given: list[str], values: dict, unread: _Unread) -> Iterator[str]:
    for names, why in unread:
        if parts := [f"{name}={values[name]}" for name in given if name in names]:
            yield f"{', '.join(parts)} has no effect with {why}"


_WITHOUT = "method.k=1, which is the base without TensorAR"


def _idle_rates(config: TrainConfig) -> _Unread:
    if config.method.k == 1:
        yield {"optim.codec_lr"}, _WITHOUT
    if config.tuning == "codec" and not config.train_image_layers:
        of_backbone = ("backbone_lr", "backbone_delay_steps", "backbone_falls")
        yield {f"optim.{name}" for name in of_backbone}, "tuning=codec"


def _unread(config: TrainConfig) -> _Unread:
    if config.method.k == 1:
        of_method = {f"method.{name}" for name in vars(config.method)} - {"method.k"}
        windows = {"sampling.draft_temperature", "sampling.renoise", "engine.codec_checkpointing"}
        yield of_method | windows, _WITHOUT
    if is_checkpoint(config.backbone.weights):
        of_base = {"backbone.grid", "backbone.text_encoder_dtype"}
        yield of_base, f"backbone.weights={config.backbone.weights}, which says it itself"
    if config.steps is not None:
        yield {"epochs"}, f"steps={config.steps} (--steps None goes by epochs)"
    if config.log.tracker != "wandb":
        yield {"log.project"}, f"log.tracker={config.log.tracker} (it is wandb's)"
    data = config.data
    if isinstance(data, LabelledOptions):
        if any(map(holds_codes, data.source)):
            yield {"data.views", "data.crop_ranges", "data.split"}, "codes that others computed"
        elif data.views == "flip":
            yield {"data.crop_ranges"}, "data.views=flip"

"""Options that a run would not read beside its other settings: refused where somebody gave them.

What a recipe says is nobody's wish: only what differs from it, and from the option's own default,
was given.
"""

from collections.abc import Iterator

from t2i.errors import UserError
from t2i.fields import given_options, leaves
from t2i.training.config import LabelledOptions, TrainConfig
from t2i.training.open_data import holds_codes
from t2i.training.settings import plain


def refuse_unread(config: TrainConfig, recipe: TrainConfig) -> None:
    """UserError that names the options which the run, made from the recipe, would not read."""
    before, now = leaves(plain(recipe)), leaves(plain(config))
    given = [name for name in given_options(config) if now.get(name) != before.get(name)]
    for names, why in _unread(config):
        parts = [name for name in given if name in names]
        if parts:
            told = ", ".join(f"{name}={now[name]}" for name in parts)
            raise UserError(f"{told} has no effect with {why}; leave it out")


def _unread(config: TrainConfig) -> Iterator[tuple[set[str], str]]:
    """Options that are not read, and beside which setting."""
    if config.method.k == 1:
        of_method = {f"method.{name}" for name in vars(config.method)} - {"method.k"}
        others = {"optim.codec_lr", "engine.codec_checkpointing"}
        windows = {"sampling.draft_temperature", "sampling.renoise"}
        yield of_method | others | windows, "method.k=1, which is the base without TensorAR"
    if config.tuning == "codec" and not config.train_image_layers:
        of_backbone = ("backbone_lr", "backbone_delay_steps", "backbone_falls")
        yield {f"optim.{name}" for name in of_backbone}, "tuning=codec"
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

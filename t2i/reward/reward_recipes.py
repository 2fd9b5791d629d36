"""The recipes of reward fine-tuning, derived from the families' control recipes.

The numbers of the shapes recipe were measured (docs/reward.md). Those for real sizes are usual in
the field: rates of 1e-6 (full) and 3e-5 to 1e-4 (adapters), groups of 8, a weak pull to the start.
"""

from dataclasses import fields, replace

from t2i.models.janus import janus_recipes
from t2i.models.llamagen import llamagen_recipes
from t2i.reward.reward_options import RewardConfig, RewardOptions
from t2i.training.config import DataOptions, EngineOptions, LogOptions, OptimOptions, TrainConfig
from t2i.training.recipes import in_own_folders

RewardRecipes = dict[str, tuple[str, RewardConfig]]

_LOG = LogOptions(
    log_every=1, validate_every=None, sample_every=None, save_every=None, at_start=True
)
_HARD = ("two_object", "counting", "position", "color_attr")
"""Tasks at which the shipped bases sometimes fail."""
_OFFICIAL_PROMPTS = (
    "a photo of a red bus and a blue bench",
    "a photo of three dogs",
    "a photo of a cat left of a chair",
    "a photo of a purple backpack and a yellow umbrella",
)


def recipes() -> RewardRecipes:
    """Recipe name -> (one-line description, settings)."""
    llamagen, janus = llamagen_recipes.recipes(), janus_recipes.recipes()
    shapes = _on_shapes(llamagen["shapes-control"][1], rate=1e-4)
    guided = replace(
        _on_shapes(llamagen["shapes-control"][1], rate=3e-4),
        batch_size=32,
        steps=200,
        ema=0.0,
    )
    guided = replace(
        guided,
        optim=replace(guided.optim, warmup_steps=10, backbone_falls=True),
        reward=replace(
            guided.reward, functions=(), group=2, kl=1.0, start_cfg_scale=4.0, start_temperature=0.7
        ),
    )
    tiny_janus = _on_shapes(janus["shapes-janus-control"][1], rate=3e-4)
    janus_1b = replace(
        _real(janus["janus-pro-1b-control"][1], rate=3e-5),
        train_image_layers=False,
    )
    # Load the text head, so that `watch/text_kl` can show what training does to it.
    janus_1b = replace(janus_1b, backbone=replace(janus_1b.backbone, generation_only=False))
    xl = _real(llamagen["t2i-xl-256-control"][1], rate=1e-6)
    found = {
        "shapes-guided": ("offline shapes world: guidance built in, nothing rewarded", guided),
        "shapes-reward": ("offline shapes world: GenEval as the teacher", shapes),
        "shapes-janus-reward": ("offline shapes world, tiny Janus: adapters", tiny_janus),
        "janus-pro-1b-reward": ("Janus-Pro 1B: adapters, GenEval as the teacher", janus_1b),
        "t2i-xl-256-reward": ("LlamaGen XL at 256 px as a whole, GenEval as the teacher", xl),
    }
    return in_own_folders(found)


def _rewarded(config: TrainConfig, reward: RewardOptions) -> RewardConfig:
    own = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    own |= {"batch_size": 64, "steps": 100, "token_dropout": 0.0, "condition_dropout": 0.0}
    return RewardConfig(**own, reward=reward)


def _on_shapes(config: TrainConfig, rate: float) -> RewardConfig:
    config = _rewarded(config, RewardOptions(group=16, tasks=_HARD))
    return replace(
        config,
        batch_size=256,
        steps=60,
        ema=0.95,
        train_image_layers=False,
        data=DataOptions(source="shapes:640", validation_samples=128),
        optim=OptimOptions(codec_lr=rate, backbone_lr=rate, weight_decay=0.0),
        engine=EngineOptions(micro_batch=32),
        log=replace(_LOG, prompts=config.log.prompts),
    )


def _real(config: TrainConfig, rate: float) -> RewardConfig:
    reward = RewardOptions(prompts="official", watch=("geneval",), kl=0.01)
    config = _rewarded(config, reward)
    return replace(
        config,
        steps=1600,
        optim=replace(config.optim, backbone_lr=rate, codec_lr=rate, weight_decay=0.0),
        log=replace(_LOG, log_every=None, prompts=_OFFICIAL_PROMPTS),
    )

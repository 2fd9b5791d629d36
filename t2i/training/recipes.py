"""What the families' recipes share (`t2i/models/*/*_recipes.py`), and the program that runs one.

The ImageNet recipe is the paper's (arXiv 2505.16324): batch 256, 20 epochs, AdamW (0.9, 0.95),
weight decay 0.05, clipping at 1.0, 10 % of the classes dropped, token dropout 0.1, the codec's rate
falling to 0, a lower constant one for the backbone. Both rates are lost in all copies of the paper.
The ones here are our choice; the backbone's is a tenth of the usual pre-training rate.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from t2i import cli, launcher
from t2i.errors import UserError, choose_one
from t2i.fields import from_json
from t2i.models.families import FAMILIES, module_if_any
from t2i.tensorar import presets
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)

C = TypeVar("C", bound=TrainConfig)
Recipes = dict[str, tuple[str, TrainConfig]]
"""Recipe name -> (one-line description, settings)."""

OWN_PICTURES = LogOptions(
    log_every=None,
    validate_every=None,
    sample_every=None,
    save_every=None,
    at_start=True,
    prompts=(),
)
"""Outputs as often as the run's length suggests, and sheets of held-out captions."""
_CLASSES = ("207", "360", "387", "974", "88", "979", "417", "279")
"""Class ids of the sheets: the examples of LlamaGen's demo."""
METHODS = {
    "tuned": (presets.tuned(), "light drafts, half of them its own"),
    "iclr2026": (presets.iclr2026(), "ICLR 2026 method"),
    "arxiv2505": (presets.arxiv2505(), "arXiv v1 method"),
    "control": (presets.base(), "the base fine-tuned as usual"),
}
"""Ending of a recipe's name -> (method, description); class recipes have no ending for tuned."""
_CLASS_SHAPES = Path("runs/class-shapes")
"""Folder of the offline classes."""
_MAIN_OPTIONS = (
    *("data.source", "data.caption_column", "data.validation_samples"),
    *("run_dir", "resume", "check", "backbone.weights", "batch_size", "epochs", "steps", "seed"),
    *("engine.micro_batch", "engine.zero_stage", "method.k", "optim.codec_lr", "optim.backbone_lr"),
    *("log.prompts", "log.sample_every", "log.save_every"),
)
"""The options of a recipe that --help shows."""


def in_own_folders(recipes: Mapping[str, tuple[str, C]]) -> dict[str, tuple[str, C]]:
    """The same recipes, each with a run folder of its own name."""
    return {
        name: (about, replace(config, run_dir=Path("runs") / name))
        for name, (about, config) in recipes.items()
    }


def small_data(config: TrainConfig) -> TrainConfig:
    """For a few hundred to a few thousand pictures on one GPU: adapters, ten passes."""
    return replace(
        config,
        method=presets.tuned(own_drafts=1.0),
        tuning="lora",
        train_image_layers=False,
        optim=replace(config.optim, codec_lr=3e-4, backbone_lr=1e-4, warmup_steps=None),
        engine=replace(config.engine, zero_stage=1),
        log=replace(config.log, keep_last=5),  # the best may be an earlier one
        batch_size=32,
        epochs=10.0,
    )


def on_two_cores(config: TrainConfig) -> TrainConfig:
    """For the offline world on two CPU cores: small batches, a few minutes."""
    return replace(
        config,
        engine=EngineOptions(micro_batch=32),
        log=replace(config.log, save_every=100),
        batch_size=32,
        steps=200,
        token_dropout=0.0,
    )


def bf16(micro_batch: int, zero_stage: Literal[1, 2, 3] = 2) -> EngineOptions:
    """The engine for models of real size on GPUs."""
    return EngineOptions(zero_stage, "bf16", micro_batch, gradient_checkpointing=True)


def imagenet(
    name: str,
    about: str,
    backbone: BackboneOptions,
    data: LabelledOptions,
    *,
    micro_batch: int,
    gradient_checkpointing: bool,
) -> Recipes:
    """Recipes of a published class-conditional model, one per method; micro_batch fits 80 GB."""
    config = TrainConfig(
        backbone=backbone,
        data=data,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-5, warmup_steps=None),
        engine=replace(bf16(micro_batch), gradient_checkpointing=gradient_checkpointing),
        log=replace(OWN_PICTURES, prompts=_CLASSES),
    )
    return _with_each_method(name, about, config)


def class_shapes(family: str) -> Recipes:
    """Recipes of the offline classes (`launch/lab/pretrain_class_shapes.py`), one per method."""
    config = TrainConfig(
        backbone=BackboneOptions(family=family, weights=str(_CLASS_SHAPES / family)),
        data=LabelledOptions(
            source=(str(_CLASS_SHAPES / "images"),), views="flip", validation_samples=256
        ),
        optim=OptimOptions(codec_lr=3e-3, backbone_lr=1e-4, warmup_steps=20),
        log=LogOptions(prompts=("0", "5", "10", "15")),
    )
    name = f"{family.replace('_', '-')}-shapes"
    return _with_each_method(name, "offline classes of shapes", on_two_cores(config))


def _with_each_method(name: str, about: str, config: TrainConfig) -> Recipes:
    found: Recipes = {}
    for end, (method, words) in METHODS.items():
        own = name if end == "tuned" else f"{name}-{end}"
        found[own] = (f"{about}, {words}", replace(config, method=method))
    return in_own_folders(found)


# -- the programs ----------------------------------------------------------------------------------
def recipes_for(data: type[DataOptions] | type[LabelledOptions]) -> Recipes:
    """The recipes of all families that train on such data."""
    found: Recipes = {}
    for family in FAMILIES:
        if module := module_if_any(family, "recipes"):
            found |= import_module(module).recipes()
    return {name: recipe for name, recipe in found.items() if isinstance(recipe[1].data, data)}


def recipe(name: str, options: Mapping[str, Any] | None = None) -> TrainConfig:
    """The training run of a named recipe, for `t2i.train`.

    Args:
        options: by their command-line names, such as {"steps": 20, "data.source": "my_images"};
            {"data": {"source": "my_images"}} is the same. "~/" is the home folder, as in a shell.

    Raises:
        UserError: unknown recipe or option, or a value that is not allowed.
    """
    recipes = recipes_for(DataOptions) | recipes_for(LabelledOptions)
    if not isinstance(name, str) or name not in recipes:
        raise UserError(f"unknown recipe {name!r:.80}; {choose_one(name, recipes)}")
    if not isinstance(options, Mapping | None):
        raise UserError(f'options is {options!r:.80}: give a mapping, such as {{"steps": 20}}')
    own = recipes[name][1]
    return settle_options(_with_options(own, options or {}, ""), own)


def _with_options(config: Any, options: Mapping[str, Any], prefix: str) -> Any:
    """Settings with some of them changed: "part.option" changes an option of a part, and so does a
    mapping given for the part.
    """
    known = vars(config)
    own: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        part, _, option = name.replace("-", "_").partition(".")
        if part not in known or (option and not is_dataclass(known[part])):
            nearest = get_close_matches(part, known, 1)
            perhaps = f"; perhaps you meant {prefix}{nearest[0]}" if nearest else ""
            raise UserError(f"there is no option {prefix}{name}{perhaps}")
        if option:
            of_parts.setdefault(part, {})[option] = value
        elif isinstance(value, Mapping) and is_dataclass(known[part]):
            of_parts[part] = of_parts.get(part, {}) | {**value}
        else:
            own[part] = _at_home(value)
    for part, values in of_parts.items():
        own[part] = _with_options(known[part], values, f"{prefix}{part}.")
    return from_json(type(config), own, prefix.rstrip(".") or "options", defaults=config)


def _at_home(value: Any) -> Any:
    """Paths as strings, with a leading "~/" expanded, as on the command line."""
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    if not isinstance(value, str | Path):
        return value
    return os.path.expanduser(value) if str(value).startswith("~/") else str(value)


def settle_options(config: C, own: C) -> C:
    """`unread_options.settle_options`, imported late since it imports torch; own: the recipe."""
    from t2i.training import unread_options

    return unread_options.settle_options(config, own)


def _program_of(name: str) -> str | None:
    """The program that offers the recipe of this name."""
    if name in recipes_for(LabelledOptions):
        return "launch/train_imagenet.py"
    _, found = recipes_for(DataOptions).get(name, (None, None))
    return None if found is None else f"launch/train_{found.backbone.family}.py"


def run_recipe(
    recipes: Mapping[str, tuple[str, C]],
    description: str,
    run: Callable[[C], Path] | None = None,
    look: Callable[[C, int], str] | None = None,
    main: Sequence[str] = (),
) -> None:
    """The body of every `launch/train_*.py`: parse a recipe with overrides, and check or train it.

    Only the main process prints.

    Args:
        run: trains; None: `t2i.training.loop.train`.
        look: returns the report of --check for a number of processes; None:
            `t2i.training.check.check`.
        main: options that --help shows in addition to the common ones.
    """
    main = (*_MAIN_OPTIONS, *main)
    config = cli.parse_recipe(recipes, description, main, _program_of, settle_options)
    base = Path(config.backbone.weights)
    if base.parent == _CLASS_SHAPES and not base.exists():
        raise UserError(
            f"{base} does not exist yet; make it with "
            f"python launch/lab/pretrain_class_shapes.py --backbone {base.name}"
        )
    if config.check:
        from t2i.training.check import check

        report = (look or check)(config, launcher.world_size())
        if launcher.is_main_process():
            print(report)
        return
    from t2i.training.loop import train

    folder = (run or train)(config)
    if launcher.is_main_process():
        print(f"checkpoint: {folder}\nrun page:   {config.run_dir / 'index.html'}")
        if isinstance(config.data, DataOptions) and config.data.trigger:
            prompt = config.data.with_trigger("your prompt")
            print(f"trained with trigger words; use them in prompts: --prompt {prompt!r}")

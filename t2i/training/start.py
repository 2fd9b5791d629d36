"""The model that a run trains: a published base with a fresh codec, or an earlier run's weights."""

import logging
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from t2i.checkpoint import load_stored_backbone, stored_part, stored_source, trained_parts
from t2i.checkpoint_folders import (
    CODEC,
    EXPORTED,
    choose_checkpoint,
    find_checkpoint,
    is_checkpoint,
    read_config,
)
from t2i.errors import UserError
from t2i.files import json_sha256
from t2i.loading import load_source
from t2i.lora import add_lora, merge_lora
from t2i.manifest import TRAINING_STATE, listed_weights
from t2i.models.base import Backbone
from t2i.sampling import SamplingConfig
from t2i.sources import (
    BackboneSource,
    base_files,
    expand_folder,
    moved,
    prove,
    shipped_bases,
    weights_sha256,
)
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import check_sampling
from t2i.training.config import BackboneOptions, TrainConfig
from t2i.weights import load_strict, read_state_dict

log = logging.getLogger(__name__)


def build_model(
    config: TrainConfig, *, device: str = "cpu", resumed: Path | None = None
) -> TensorAR:
    """The backbone with a fresh codec (and adapters); only the chosen parameters are trainable.

    If the weights are an earlier run's, its codec is used, too. `resumed`: the run's own checkpoint
    to load instead.
    """
    options = config.backbone
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    continued = resumed is None and is_checkpoint(options.weights)
    if resumed is not None:
        backbone = _resumed_backbone(resumed, options, torch.device(device), dtype)
    elif continued:
        backbone = start_from(options.weights, options, device=device, dtype=dtype)
    else:
        backbone = load_source(_base_of(options), device=device, dtype=dtype)
    model = TensorAR(backbone, config.method, seed=config.seed)
    if continued:
        _take_codec(model, options.weights)
    backbone.requires_grad_(False)
    if config.tuning == "lora":
        add_lora(backbone, config.lora, seed=config.seed)
    whole = backbone.trained_modules() if config.tuning == "full" else ()
    if config.train_image_layers:
        whole = tuple(backbone.image_layers().values())
    for module in whole:
        module.requires_grad_(True)
    backbone.token_dropout.p = config.token_dropout
    backbone.gradient_checkpointing = config.engine.gradient_checkpointing
    backbone.compile_blocks = config.engine.compile
    model.recompute_codec = config.engine.codec_checkpointing
    model.sampling = config.drawn_with(model.sampling)
    check_sampling(model, model.sampling)  # now, since the first sheet may come hours later
    model.trained = trained_parts(config.tuning, config.train_image_layers, config.method.k)
    return model


def start_from(
    folder: str | Path,
    options: BackboneOptions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """The backbone of a checkpoint as the base of a new run: changed weights, merged adapters,
    sampling settings.

    The new run's checkpoints will hold all of these weights: they do not need the old folder, only
    the base's other files.

    Args:
        folder: checkpoint, run or export folder.
        options: where the base's tokenizer and text encoder are now, and what is not loaded.
    """
    folder = choose_checkpoint(folder)
    config = read_config(folder)
    family = config["backbone"].get("family")
    if family not in (None, options.family):
        raise UserError(
            f"backbone.family={options.family}, but {folder} is of the family {family}: use a "
            "recipe of that family"
        )
    source = _source_now(config, folder, options)
    merged = config.get("tuning") == "lora"
    exact = torch.float32 if merged else dtype  # in bf16 rounding would lose the adapters' changes
    backbone = load_stored_backbone(
        folder, config, source, adapter=merged, device=torch.device(device), dtype=exact
    )
    if merged:
        merge_lora(backbone)
        backbone.to(dtype)
    sampling = replace(stored_part(config, "sampling", SamplingConfig, folder), window=0, stride=1)
    backbone.spec = replace(backbone.spec, sampling=sampling)
    changed = config["tuning"] != "codec" or config.get("image_layers")
    assert backbone.source is not None, "of load_backbone"
    backbone.source = replace(
        backbone.source,
        sampling=asdict(sampling),
        started_from=str(folder.resolve()) if changed else source.started_from,
    )
    return backbone


def _resumed_backbone(
    folder: Path, options: BackboneOptions, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """The backbone of a run's own checkpoint, without its adapters: their training continues."""
    config, base = read_config(folder), local_base(options.weights)
    source = _source_now(config, folder, options, base)
    if base is not None:
        prove(expand_folder(source))  # the base may have moved since the run began
    return load_stored_backbone(folder, config, source, adapter=False, device=device, dtype=dtype)


def _source_now(
    config: dict, folder: Path, options: BackboneOptions, base: Path | None = None
) -> BackboneSource:
    """A checkpoint's source, given where the files of its base are now."""
    stored = stored_source(config, folder)
    given = _given_files(options, moved(stored, base=base))
    source = moved(stored, base=base, **given)
    return replace(source, generation_only=options.generation_only)


def _base_of(options: BackboneOptions) -> BackboneSource:
    """The files of a base that is no checkpoint."""
    given = _given_files(options, base_files(options.family, options.weights))
    return base_files(**asdict(options) | given)


def _given_files(options: BackboneOptions, source: BackboneSource) -> dict[str, str | None]:
    """The tokenizer and text encoder to use instead of the source's own; None: its own.

    A name on the hub, which published recipes have by default, is not used for a file that the
    source has here: a folder's weights belong to its own tokenizer, and an export's copy has
    another format, and so another hash, than the hub's.
    """
    here = expand_folder(source)
    given = {"tokenizer": options.tokenizer, "text_encoder": options.text_encoder}
    unused = []
    for name, place in given.items():
        own = getattr(here, name)
        if place and not Path(place).exists() and own and Path(own).exists():
            given[name] = None
            unused.append(place)
    if unused:
        _say_whose(" and ".join(unused), source.weights)
    return given


@cache
def _say_whose(unused: str, folder: str) -> None:
    """Said once, also for a recipe's names: they cannot be told from those that a user gives."""
    log.info("not used: %s; %s has its own", unused, folder)


def start_facts(config: TrainConfig) -> dict[str, str]:
    """The weights that a new run starts from: their place, and a hash of their content."""
    weights = config.backbone.weights
    if not is_checkpoint(weights):
        files = _base_of(config.backbone)
        return {"weights": files.weights, "sha256": weights_sha256(files)}
    folder = find_checkpoint(weights)
    source = stored_source(read_config(folder), folder)
    base = {} if source.started_from else {"base": weights_sha256(source)}
    whole = {k: v for k, v in listed_weights(folder).items() if not k.startswith(TRAINING_STATE)}
    return {"weights": str(folder.resolve()), "sha256": json_sha256(whole | base)}


def check_start(config: TrainConfig, folder: Path) -> None:
    """UserError if a run that compares itself with its start is resumed with another start."""
    before = read_config(folder)["training"].get("start")
    if not isinstance(before, dict):
        return
    try:
        now = start_facts(config)
    except UserError as error:
        raise UserError(
            f"cannot resume {folder}: the run compares itself with the weights that it began with, "
            f"which cannot be read ({error}); give them as --backbone.weights, wherever they are now"
        ) from error
    if before.get("sha256") != now["sha256"]:
        raise UserError(
            f"cannot resume {folder} with backbone.weights={config.backbone.weights}: the run needs "
            f"the weights that it began with ({before.get('weights')}), and these are different; "
            "give the original ones, wherever they are now"
        )


def local_base(weights: str) -> Path | None:
    """The local base that these weights are, or that an export holds; None for a shipped base, a
    name on the hub, or a run.
    """
    if weights in shipped_bases() or not Path(weights).exists():
        return None
    if not is_checkpoint(weights):
        return Path(weights)
    found = find_checkpoint(weights)
    return found.parent if found.name == EXPORTED else None


def _take_codec(model: TensorAR, folder: str | Path) -> None:
    """Copy a checkpoint's codec into a model if its shape is the same, or else log the changes."""
    folder = find_checkpoint(folder)
    method = stored_part(read_config(folder), "method", TensorARConfig, folder)
    if model.codec is None or method.k == 1:
        return
    shape = ("k", "depth", "mlp", "residual")
    if changes := [
        f"{name} {getattr(method, name)} -> {getattr(model.config, name)}"
        for name in shape
        if getattr(method, name) != getattr(model.config, name)
    ]:
        log.info("starting with a fresh codec: %s has another (%s)", folder, ", ".join(changes))
    elif next(model.parameters()).device.type != "meta":
        load_strict(model.codec, read_state_dict(folder / CODEC), folder / CODEC)

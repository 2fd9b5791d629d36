"""Checkpoint folders: everything needed to load a model again.

config.json            method, backbone source (with hash), tuning mode, sampling defaults, kit
                       version, training facts
codec.safetensors      TensorAR's own weights (absent for k = 1)
adapter/               a PEFT folder, if LoRA was used; also holds the image layers if they were
                       trained
backbone.safetensors   the backbone weights that training changed, under official names: all of
                       them, or the image layers
manifest.json          name, size and SHA-256 of every file (see `t2i.manifest`); written last: a
                       folder without it is incomplete
training_state/        what resuming needs (see `t2i.training.run_state`); may be deleted once
                       training is finished
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from t2i import __version__
from t2i.checkpoint_folders import CODEC, choose_checkpoint, is_checkpoint, read_config
from t2i.errors import UserError
from t2i.fields import check_type, from_json
from t2i.files import replacing_folder, write_json
from t2i.loading import attach, load_source, pick_device
from t2i.lora import load_adapter, plain_weights, save_adapter
from t2i.manifest import refuse_replacing, write_manifest
from t2i.models.base import Backbone
from t2i.models.families import find_family
from t2i.sampling import SamplingConfig
from t2i.sources import (
    BackboneSource,
    base_files,
    beside,
    check_place,
    check_places,
    family_of,
    moved,
    refuse_gone,
    with_hashes,
)
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tuning import Tuning
from t2i.weights import copy_weights, load_strict, read_state_dict, save_weights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_BACKBONE = "backbone.safetensors"
_MERGE = (
    "add adapters to the weights with t2i.lora.merge_lora(model.backbone), and give tuning='full'"
)


def save_pretrained(
    model: TensorAR,
    folder: str | Path,
    *,
    tuning: Tuning,
    image_layers: bool = False,
    sampling: SamplingConfig | None = None,
    training: dict | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: a new one, an empty one, or an earlier checkpoint's, which is replaced.
        tuning: which of the backbone's weights differ from the base: all ("full"), none ("codec"),
            or only by adapters ("lora").
        image_layers: whether the layers that embed and predict image codes differ, too.
        sampling: default settings for `generate`; the model's own if None.
        training: facts about the run, stored unchanged: what JSON can hold.

    Raises:
        UserError: an argument has the wrong type, the folder holds other files, or the backbone is
            not from `load_backbone`.
    """
    check_place(folder, "folder")
    for name, value, kind in (
        ("model", model, TensorAR),
        ("tuning", tuning, Tuning),
        ("image_layers", image_layers, bool),
        ("sampling", sampling, SamplingConfig | None),
        ("training", training, dict | None),
    ):
        check_type(value, kind, name)
    try:
        json.dumps(training, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"training holds what JSON cannot: {error}") from error
    if model.backbone.source is None:
        raise UserError(
            "this backbone was not loaded by load_backbone, so a checkpoint could not name its base; "
            "load it with load_backbone(family, source)"
        )
    if tuning == "lora" and model.backbone.lora is None:
        raise UserError(
            "tuning='lora' stores the adapters of a run with --tuning lora, and this model has none "
            f"of these: {_MERGE}"
        )
    if tuning != "lora" and any(".base_layer." in n for n, _ in model.backbone.named_parameters()):
        raise UserError(
            f"this model has adapters, which tuning={tuning!r} would leave out: give tuning='lora' "
            f"if they are those of a run; otherwise, {_MERGE}"
        )
    refuse_replacing(Path(folder))
    with new_checkpoint(Path(folder)) as partial:
        write_model(
            model,
            partial,
            tuning=tuning,
            image_layers=image_layers,
            sampling=sampling,
            training=training,
        )
    return Path(folder)


@contextmanager
def new_checkpoint(folder: Path) -> Iterator[Path]:
    """An empty folder for a checkpoint's files; the manifest is written when the block ends."""
    with replacing_folder(folder) as partial:
        yield partial
        write_manifest(partial)


def write_model(
    model: TensorAR,
    folder: Path,
    *,
    tuning: Tuning,
    image_layers: bool,
    training: dict | None,
    sampling: SamplingConfig | None = None,
) -> None:
    """Write all files except the manifest into a folder; arguments as in `save_pretrained`."""
    backbone = model.backbone
    assert backbone.source is not None, "checked by the caller"
    backbone.source = with_hashes(backbone.source, folder)
    if model.codec is not None:
        save_weights(folder / CODEC, model.codec.state_dict())
    if tuning == "lora":
        save_adapter(backbone, folder / "adapter", image_layers=image_layers)
    if holds_all_weights(tuning, backbone.source):
        save_weights(folder / _BACKBONE, plain_weights(backbone))
    elif tuning == "codec" and image_layers:
        save_weights(folder / _BACKBONE, _image_layers(backbone))
    write_json(
        folder / "config.json",
        {
            "kit_version": __version__,
            "tuning": tuning,
            "image_layers": image_layers,
            "method": asdict(model.config),
            "backbone": asdict(backbone.source),
            "sampling": asdict(sampling or model.sampling),
            "training": training or {},
        },
    )


def holds_all_weights(tuning: Tuning, source: BackboneSource) -> bool:
    """Whether a checkpoint holds all of the backbone's weights, so that its base is not needed."""
    return tuning == "full" or source.started_from is not None


def _image_layers(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Weights of the layers that embed and predict image codes, under official names."""
    layers = backbone.image_layers().items()
    return {f"{name}.{k}": v for name, layer in layers for k, v in layer.state_dict().items()}


def from_pretrained(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    generation_only: bool | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> TensorAR:
    """Load a checkpoint folder, a run folder's newest checkpoint or an export, in eval mode.

    Args:
        base: where the base is now, if it moved: its weight file, or the folder that its files
            moved to (weights, image tokenizer and text encoder are found there by their names and
            checked by their hashes).
        tokenizer: where the image tokenizer is now.
        text_encoder: where the text encoder is now.
        generation_only: whether to leave out parts that drawing images does not need; as in
            training if None.
        device: "auto" is a GPU if there is one, else the CPU.
        dtype: "auto" is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        UserError: no complete checkpoint, files of the base are missing or have changed (each is
            named), or no such device.
    """
    check_place(folder, "folder")
    check_places(base=base, tokenizer=tokenizer, text_encoder=text_encoder)
    device, dtype = pick_device(device, dtype)
    folder = choose_checkpoint(folder)
    config = read_config(folder, contents=True)
    source = moved(
        stored_source(config, folder), base=base, tokenizer=tokenizer, text_encoder=text_encoder
    )
    if generation_only is not None:
        source = replace(source, generation_only=generation_only)
    backbone = load_stored_backbone(folder, config, source, device=device, dtype=dtype)
    model = TensorAR(backbone, stored_part(config, "method", TensorARConfig, folder))
    if model.codec is not None:
        load_strict(model.codec, read_state_dict(folder / CODEC), folder / CODEC)
    model.sampling = stored_part(config, "sampling", SamplingConfig, folder)
    model.trained = trained_parts(
        config["tuning"], config.get("image_layers", False), model.config.k
    )
    return model.eval()


def trained_parts(tuning: Tuning, image_layers: bool, k: int) -> str:
    """The parts that a run trains, in words; with k = 1 there is no codec."""
    own = {"full": ["backbone"], "lora": ["LoRA adapters"], "codec": []}[tuning]
    own += [*["image layers"] * image_layers, *["codec"] * (k > 1)]
    return " + ".join(own) or "nothing"


def stored_source(config: dict, folder: Path) -> BackboneSource:
    """The base that a checkpoint's config.json names, with absolute paths for local files."""
    return beside(stored_part(config, "backbone", BackboneSource, folder), folder)


def stored_part(config: dict, name: str, cls: type[S], folder: Path) -> S:
    """A part of config.json as an object; UserError for a setting that this version lacks."""
    return from_json(cls, config[name], f"{folder}/config.json: {name}")


def load_stored_backbone(
    folder: Path,
    config: dict,
    source: BackboneSource,
    *,
    adapter: bool = True,
    device: torch.device,
    dtype: torch.dtype,
) -> Backbone:
    """The backbone of a checkpoint folder, with its LoRA adapter unless `adapter` is False."""
    tuning, changed = config["tuning"], folder / _BACKBONE
    holds_all = holds_all_weights(tuning, source)
    replaces_base = holds_all and not find_family(source.family).published_as_folder
    # A base folder and some weight files also provide the image tokenizer.
    refuse_gone(source, folder, weights=not replaces_base or source.tokenizer is None)
    tuned = changed if replaces_base else None
    backbone = load_source(source, weights=tuned, dtype=dtype, device=device)
    if changed.is_file() and not replaces_base:
        own = backbone.official_state_dict() if holds_all else _image_layers(backbone)
        copy_weights(own, read_state_dict(changed), changed)
    if tuning == "lora" and adapter:
        load_adapter(backbone, folder / "adapter")
    return backbone


def load_model(
    source: str | Path,
    *,
    family: str | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> TensorAR:
    """Load a trained model or a plain base (k = 1) for drawing images, in eval mode.

    Parts that drawing images does not need are left out.

    Args:
        source: a checkpoint, run or export folder; a shipped base ("shapes"); a backbone folder; a
            published weight file or folder, or its name on the hub ("owner/repo:file",
            "owner/repo").
        family: the family of a published base; checkpoints, shipped bases and backbone folders name
            their own.
        base: where a checkpoint's base is now, if it moved (see `from_pretrained`).
        tokenizer: image tokenizer of a base, or where a checkpoint's tokenizer is now.
        text_encoder: caption encoder of a base, or where a checkpoint's encoder is now.
        device: "auto" is a GPU if there is one, else the CPU.
        dtype: "auto" is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        UserError: the source is none of these, a part is missing, or `base` is given for a base.
    """
    check_place(source, "source")
    if is_checkpoint(source):
        return from_pretrained(
            source,
            base=base,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            generation_only=True,
            device=device,
            dtype=dtype,
        )
    if base is not None:
        raise UserError(f"{source} is not a checkpoint, so it has no other base: leave out base")
    helpers = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    check_places(**helpers)
    files = base_files(family or family_of(source), source, **helpers, generation_only=True)
    return load_base(files, device, dtype)


def load_base(
    files: BackboneSource, device: torch.device | str, dtype: torch.dtype | str
) -> TensorAR:
    """Load a plain base (k = 1) for drawing images, in eval mode."""
    device, dtype = pick_device(device, dtype)
    backbone = load_source(files, device=device, dtype=dtype)
    return attach(backbone, TensorARConfig(k=1))

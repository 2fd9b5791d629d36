"""Checkpoint folders: everything a model needs to be loaded again, and a manifest that is written last.

config.json            method, backbone source (with hash), tuning mode, sampling defaults, kit version, training facts
codec.safetensors      TensorAR's own weights (absent for k = 1)
adapter/               a PEFT folder, when LoRA was used
backbone.safetensors   what changed of the backbone itself, under official names: all of it, or its image layers
manifest.json          name, size and SHA-256 of every file: a folder without it is incomplete (see t2i.manifest)
training_state/        what resume needs (see t2i.training.run_state); may be deleted from a model that is finished
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from t2i import __version__
from t2i.backbones.base import Backbone, SamplingConfig
from t2i.errors import UserError
from t2i.files import saving, write_json
from t2i.loading import BackboneSource, load_source, published_as_folder, with_hash
from t2i.lora import load_adapter, save_adapter
from t2i.manifest import MANIFEST, DamagedError, check_files, write_manifest
from t2i.tensorar.model import TensorAR, TensorARConfig
from t2i.weights import copy_weights, load_strict, read_state_dict, save_weights

Tuning = Literal["full", "codec", "lora"]
log = logging.getLogger(__name__)

EXPORTED = "tensorar"
"""Name of the checkpoint folder within an export (see t2i.export); its base is given relative to it."""


def save_pretrained(
    model: TensorAR,
    folder: str | Path,
    *,
    tuning: Tuning,
    image_layers: bool = False,
    sampling: SamplingConfig | None = None,
    training: dict | None = None,
) -> Path:
    """Write a checkpoint folder under a temporary name and rename it.

    Args:
        tuning: which weights differ from the base: all of the backbone, none ("codec"), or the adapters.
        image_layers: the layers that embed and predict image codes differ, too.
        sampling: what `generate` uses by default; the model's or backbone's own settings if None.
        training: facts about the run, stored as they are.
    """
    if model.backbone.source is None:
        raise UserError(
            "this backbone was not loaded by load_backbone, so a checkpoint could not name its base"
        )
    folder = Path(folder)
    with partial_folder(folder) as partial:
        write_model(
            model,
            partial,
            tuning=tuning,
            image_layers=image_layers,
            sampling=sampling,
            training=training,
        )
        finish_folder(partial, folder)
    return folder


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to write to; whatever goes wrong until it is renamed, it goes.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        with saving(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    model: TensorAR,
    folder: Path,
    *,
    tuning: Tuning,
    image_layers: bool = False,
    sampling: SamplingConfig | None = None,
    training: dict | None = None,
) -> None:
    """Write all files but the manifest into an existing folder; arguments as in `save_pretrained`."""
    backbone = model.backbone
    backbone.source = with_hash(
        backbone.source
    )  # kept: a large file is read once, not at every save
    if model.codec is not None:
        save_weights(folder / "codec.safetensors", model.codec.state_dict())
    if tuning == "lora":
        save_adapter(backbone, folder / "adapter")
    if tuning == "full" or image_layers:
        save_weights(folder / "backbone.safetensors", _changed_weights(backbone, tuning))
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


def finish_folder(partial: Path, folder: Path) -> None:
    """Write the manifest, then rename the folder to its final name."""
    write_manifest(partial)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _changed_weights(backbone: Backbone, tuning: Tuning) -> dict[str, torch.Tensor]:
    """The backbone's own weights that a run with this tuning changes: all, or those of its image layers."""
    if tuning == "full":
        return backbone.official_state_dict()
    layers = backbone.image_layers().items()
    return {f"{name}.{k}": v for name, layer in layers for k, v in layer.state_dict().items()}


def read_config(folder: str | Path, *, with_state: bool = False, contents: bool = False) -> dict:
    """The config.json of a complete checkpoint folder.

    Args:
        with_state: also ask for the files that resume needs.
        contents: compare checksums, not only sizes: reads every file.

    Raises:
        UserError: no such folder, not a checkpoint, incomplete, or a file is not what was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist (or is a file)")
    check_files(folder, with_state=with_state, contents=contents)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sections = [config[name] for name in ("backbone", "method", "sampling", "training")]
        tuning = config["tuning"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{folder / 'config.json'} is not what a checkpoint has ({error!r}); copy the folder again"
        ) from error
    if not all(isinstance(section, dict) for section in sections) or tuning not in get_args(Tuning):
        raise DamagedError(f"{folder / 'config.json'} is not what a checkpoint has")
    return config


def run_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    steps = {
        int(match[1]): folder
        for folder in (Path(run_dir) / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", folder.name)) and (folder / MANIFEST).is_file()
    }
    return [steps[step] for step in sorted(steps)]


def newest_healthy(run_dir: str | Path, *, with_state: bool = False) -> Path | None:
    """The newest checkpoint of a run whose files are what was written; None if the run has no complete one.

    Goes back from a damaged one with a warning that names the file.

    Raises:
        DamagedError: all are damaged.
    """
    damage = None
    for folder in reversed(run_checkpoints(run_dir)):
        try:
            read_config(folder, with_state=with_state, contents=True)
        except DamagedError as error:
            log.warning("%s is passed over: %s", folder, error)
            damage = damage or error
            continue
        if damage is not None:
            log.warning("going back to %s", folder)
        return folder
    if damage is not None:
        raise DamagedError(f"{run_dir} has no healthy checkpoint: {damage}") from damage
    return None


def find_checkpoint(folder: str | Path) -> Path:
    """The folder itself, the newest healthy checkpoint of a run folder, or the one within an export.

    Raises:
        DamagedError: it is a run folder, and all its checkpoints are damaged.
    """
    if found := newest_healthy(folder):
        return found
    exported = Path(folder) / EXPORTED
    return exported if (exported / MANIFEST).is_file() else Path(folder)


def from_pretrained(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    generation_only: bool | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TensorAR:
    """Load a checkpoint folder (or a run's newest, or an export), in eval mode.

    Args:
        base: where the base weights are now, if they moved.
        generation_only: whether to leave out what drawing images does not need; as in training if None.
    """
    folder = find_checkpoint(folder)
    config = read_config(folder, contents=True)
    source = _section(BackboneSource, config["backbone"], folder)
    if generation_only is not None:
        source = replace(source, generation_only=generation_only)
    if base is not None:
        source = replace(source, weights=str(base))
    elif source.weights.startswith(".."):
        source = replace(source, weights=str((folder / source.weights).resolve()))
    changed = folder / "backbone.safetensors"
    replaces_base = config["tuning"] == "full" and not published_as_folder(source.family)
    tuned = changed if replaces_base else None
    local = Path(source.weights)
    needed = tuned is None or source.tokenizer is None  # a base folder brings its tokenizer
    if needed and local.is_absolute() and not local.exists():
        raise UserError(
            f"{folder} was trained from {local}, which is gone; base=PATH (--base PATH) says where it is now"
        )
    backbone = load_source(source, weights=tuned, dtype=dtype, device=device)
    if changed.is_file() and not replaces_base:
        own = _changed_weights(backbone, config["tuning"])
        copy_weights(own, read_state_dict(changed), "this backbone", changed)
    if config["tuning"] == "lora":
        load_adapter(backbone, folder / "adapter")
    method = {**config["method"], "slot_weights": tuple(config["method"]["slot_weights"])}
    model = TensorAR(backbone, _section(TensorARConfig, method, folder))
    if model.codec is not None:
        path = folder / "codec.safetensors"
        load_strict(model.codec, read_state_dict(path), path)
    model.sampling = _section(SamplingConfig, config["sampling"], folder)
    return model.eval()


def _section(cls: type, values: dict, folder: Path):
    """A part of config.json. A setting that is not known here may change what the weights mean, so it is refused."""
    if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
        raise UserError(
            f"{folder}: config.json has settings that this version ({__version__}) of the kit does not know: "
            f"{', '.join(unknown)}; load it with the version that wrote it"
        )
    return cls(**values)

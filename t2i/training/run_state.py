"""Checkpoints of a run: model folder and resumable training state in one folder per step, complete or absent.

    run_dir/checkpoints/step_000100/            as in t2i.checkpoint, plus
    run_dir/checkpoints/step_000100/training_state/   DeepSpeed's optimizer shards

Noise, data order, dropout and learning rates are functions of the step, so the step is all the state that is ours.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from t2i.checkpoint import (
    TRAINING_STATE,
    finish_folder,
    read_config,
    run_checkpoints,
    write_model,
)
from t2i.errors import UserError
from t2i.tensorar.model import TensorAR
from t2i.training.config import TrainConfig
from t2i.training.engine import Processes, whole_weights

log = logging.getLogger(__name__)

_MUST_MATCH = (
    "method",
    "tuning",
    "lora",
    "train_image_layers",
    "backbone",
    "batch_size",
    "seed",
    "data",
    "condition_dropout",
    "token_dropout",
)
_MAY_CHANGE = ("optim", "steps", "epochs", "sampling")  # for a reason, but not unnoticed


def save(
    engine,
    model: TensorAR,
    config: TrainConfig,
    processes: Processes,
    step: int,
    steps: int,
    data_key: str,
) -> Path:
    """Save after `step` optimizer steps; every rank calls it. `data_key` identifies the data's content."""
    folder = config.run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.barrier()
    engine.save_checkpoint(
        str(partial), tag=TRAINING_STATE, save_latest=False, exclude_frozen_parameters=True
    )
    with whole_weights(model, config.engine.zero_stage):
        if processes.is_main:
            training = {
                "step": step,
                "steps": steps,
                "world_size": processes.world_size,
                "zero_stage": config.engine.zero_stage,
                "data_key": data_key,
                "config": plain(asdict(config)),
            }
            write_model(
                model,
                partial,
                tuning=config.tuning,
                image_layers=config.train_image_layers,
                training=training,
            )
    processes.barrier()
    if processes.is_main:
        finish_folder(partial, folder)
        for old in run_checkpoints(config.run_dir)[: -config.log.keep_last]:
            shutil.rmtree(old)
    processes.barrier()
    return folder


def resume(engine, config: TrainConfig, folder: Path, data_key: str) -> int:
    """Load the training state (see also `check_resumable`); returns the number of steps done.

    Raises:
        UserError: the data set is not what it was, or there is no training state.
    """
    training = read_config(folder)["training"]
    if training["data_key"] != data_key:
        raise UserError(
            f"cannot resume {folder}: the data set has changed since (files were added, removed or edited), and with it "
            "the held-out split and the order; start a new run_dir"
        )
    # Frozen weights are not in the state: they are the base's, and already loaded.
    complete = all(p.requires_grad for p in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder), tag=TRAINING_STATE, load_module_strict=complete)
    if path is None:
        raise UserError(
            f"{folder / TRAINING_STATE} holds no training state; resume from another checkpoint"
        )
    return training["step"]


def check_resumable(config: TrainConfig, world_size: int, folder: Path) -> None:
    """UserError names the settings that differ from those of the run in `folder`."""
    stored = read_config(folder, with_state=True)["training"]
    check_settings(config, stored["config"], folder)
    layout = {
        "world_size": (stored["world_size"], world_size),
        "engine.zero_stage": (stored["zero_stage"], config.engine.zero_stage),
        **{
            f"engine.{name}": (stored["config"]["engine"][name], getattr(config.engine, name))
            for name in ("precision", "micro_batch")
        },
    }
    for name, (before, now) in layout.items():
        if before != now:
            raise UserError(
                f"{folder} was saved with {name}={before}, this run has {now}: the continuation would differ, or "
                f"DeepSpeed's optimizer shards not fit; start it with {name}={before}"
            )


def check_settings(config: TrainConfig, stored: dict, where: Path) -> None:
    """UserError if a setting differs without which the run is another one; a warning for those that may be changed."""
    now = plain(asdict(config))
    # Data are compared by their content (`resume`), wherever they lie.
    places = {name: now["data"][name] for name in ("source", "cache_dir") if name in now["data"]}
    before = stored | {"data": stored["data"] | places}

    def changes(names: tuple[str, ...]) -> str:
        return "; ".join(line for k in names for line in _differences(k, before.get(k), now.get(k)))

    if changed := changes(_MUST_MATCH):
        raise UserError(
            f"cannot resume {where} with other settings ({changed}); start a new run_dir"
        )
    if changed := changes(_MAY_CHANGE):
        log.warning("resuming %s with changed settings: %s", where, changed)


def _differences(name: str, before: object, now: object) -> list[str]:
    """'name: before -> now' of each single setting."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for k in before | now
            for line in _differences(f"{name}.{k}", before.get(k), now.get(k))
        ]
    return [] if before == now else [f"{name}: {before} -> {now}"]


def claim_run_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; refuses to overwrite another run.

    Raises:
        UserError: run_dir has a run and --resume is not given, or --resume is given and there is nothing to resume.
    """
    found = run_checkpoints(config.run_dir)
    if config.resume and found:
        return found[-1]
    if config.resume:
        settings = config.run_dir / "config.json"
        if not settings.is_file():
            raise UserError(f"--resume: {config.run_dir} holds no run; start without --resume")
        check_settings(config, json.loads(settings.read_text(encoding="utf-8")), config.run_dir)
        log.warning("%s was stopped before its first checkpoint: starting again", config.run_dir)
        return None
    if found or (config.run_dir / "metrics.jsonl").exists():
        raise UserError(
            f"{config.run_dir} already holds a run; give --resume to go on, or another --run-dir"
        )
    return None


def plain(value):
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return os.fspath(value) if isinstance(value, Path) else value

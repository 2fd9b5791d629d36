"""Checkpoints of a run: model folder and resumable training state in one folder per step, complete or absent.

    run_dir/checkpoints/step_000100/            as in t2i.checkpoint, plus
    run_dir/checkpoints/step_000100/training_state/   DeepSpeed's optimizer shards

Noise, data order, dropout and learning rates are functions of the step, so the step is all the state that is ours.
"""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from t2i.checkpoint import MANIFEST, finish_folder, read_config, write_model
from t2i.tensorar.model import TensorAR
from t2i.training.config import TrainConfig
from t2i.training.engine import Processes, whole_weights

_STATE = "training_state"
_MUST_MATCH = (
    "method",
    "tuning",
    "lora",
    "backbone",
    "batch_size",
    "seed",
    "data",
    "condition_dropout",
    "token_dropout",
)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(
        f for f in folders if re.fullmatch(r"step_\d{6,}", f.name) and (f / MANIFEST).is_file()
    )


def save(
    engine, model: TensorAR, config: TrainConfig, processes: Processes, step: int, steps: int
) -> Path:
    """Save after `step` optimizer steps; every rank calls it."""
    folder = config.run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.barrier()
    engine.save_checkpoint(
        str(partial), tag=_STATE, save_latest=False, exclude_frozen_parameters=True
    )
    with whole_weights(model, config.engine.zero_stage):
        if processes.is_main:
            training = {
                "step": step,
                "steps": steps,
                "world_size": processes.world_size,
                "zero_stage": config.engine.zero_stage,
                "config": plain(asdict(config)),
            }
            write_model(
                model, partial, tuning=config.tuning, sampling=config.sampling, training=training
            )
    processes.barrier()
    if processes.is_main:
        finish_folder(partial, folder)
        for old in checkpoints(config.run_dir)[: -config.log.keep_last]:
            shutil.rmtree(old)
    processes.barrier()
    return folder


def resume(engine, config: TrainConfig, processes: Processes, folder: Path) -> int:
    """Load the training state; returns the number of steps done.

    Raises:
        ValueError: the run was started with other settings, or on another number of processes.
    """
    check_resumable(config, processes.world_size, folder)
    path, _ = engine.load_checkpoint(str(folder), tag=_STATE, load_module_strict=False)
    if path is None:
        raise ValueError(
            f"{folder / _STATE} holds no training state; resume from another checkpoint"
        )
    return read_config(folder)["training"]["step"]


def check_resumable(config: TrainConfig, world_size: int, folder: Path) -> None:
    """ValueError names the settings that differ from those of the run in `folder`."""
    stored = read_config(folder)["training"]
    now = plain(asdict(config))
    changed = [k for k in _MUST_MATCH if stored["config"][k] != now[k]]
    if changed:
        pairs = "; ".join(f"{k}: {stored['config'][k]} -> {now[k]}" for k in changed)
        raise ValueError(
            f"cannot resume {folder} with other settings ({pairs}); start a new run_dir"
        )
    for name, value in (("world_size", world_size), ("zero_stage", config.engine.zero_stage)):
        if stored[name] != value:
            raise ValueError(
                f"{folder} was saved with {name}={stored[name]}, this run has {value}: DeepSpeed's optimizer shards do not "
                f"fit; start it with {name}={stored[name]}"
            )


def claim_run_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; refuses to overwrite another run.

    Raises:
        ValueError: run_dir has a run and --resume is not given, or --resume is given and there is nothing to resume.
    """
    found = checkpoints(config.run_dir)
    if config.resume:
        if not found:
            raise ValueError(
                f"--resume: {config.run_dir} has no complete checkpoint; start without --resume"
            )
        return found[-1]
    if found or (config.run_dir / "metrics.jsonl").exists():
        raise ValueError(
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

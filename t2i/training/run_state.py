"""Checkpoints of a run: model folder and resumable training state in one folder per step, complete
or absent.

    run_dir/checkpoints/step_000100/            as in t2i.checkpoint, plus
    run_dir/checkpoints/step_000100/training_state/   DeepSpeed's optimizer shards

Noise, data order, dropout and learning rates are functions of the step, so the step is all the
state that is ours.
"""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from t2i.checkpoint import (
    new_checkpoint,
    newest_healthy,
    read_config,
    run_checkpoints,
    write_model,
)
from t2i.errors import UserError
from t2i.files import owning, partial_folder, read_json, saving, writable_folder
from t2i.manifest import TRAINING_STATE
from t2i.tensorar.model import TensorAR
from t2i.training.config import TrainConfig
from t2i.training.engine import Processes, settings_kept, whole_weights
from t2i.training.settings import check_settings, check_state, plain, state_facts

log = logging.getLogger(__name__)


def save(
    engine,
    model: TensorAR,
    config: TrainConfig,
    processes: Processes,
    step: int,
    steps: int,
    data_key: str,
) -> Path:
    """Save after `step` optimizer steps; every rank calls it. `data_key` identifies the data's
    content.

    Raises:
        UserError: the disk is full.
    """
    folder = config.run_dir / "checkpoints" / f"step_{step:06d}"
    training = {
        "step": step,
        "steps": steps,
        "state": state_facts(config, processes.world_size),
        "data_key": data_key,
        "config": plain(asdict(config)),
    }
    with ExitStack() as stack:
        if processes.is_main:
            partial = stack.enter_context(new_checkpoint(folder))
        else:
            partial = partial_folder(folder)
            stack.enter_context(saving(folder))
        with whole_weights(model, config.engine.zero_stage):
            if processes.is_main:
                write_model(
                    model,
                    partial,
                    tuning=config.tuning,
                    image_layers=config.train_image_layers,
                    training=training,
                )
        processes.barrier()
        engine.save_checkpoint(
            str(partial), tag=TRAINING_STATE, save_latest=False, exclude_frozen_parameters=True
        )
        processes.barrier()
    if processes.is_main:
        for old in run_checkpoints(config.run_dir)[: -config.log.keep_last]:
            shutil.rmtree(old)
    processes.barrier()
    return folder


def advice(run_dir: Path) -> str:
    """What to do with a run that went wrong, which checkpoint is left included."""
    found = run_checkpoints(run_dir)
    left = f"the newest healthy checkpoint is {found[-1]}" if found else "there is no checkpoint"
    return f"{left}. Lower the learning rates, or train in fp32"


def resume(engine, config: TrainConfig, folder: Path, data_key: str) -> int:
    """Load the training state (see also `check_resumable`); returns the number of steps done.

    Raises:
        UserError: the data set is not what it was, or the state is none that DeepSpeed wrote.
    """
    training = read_config(folder)["training"]
    if training["data_key"] != data_key:
        raise UserError(
            f"cannot resume {folder}: the data set has changed since (files were added, removed or "
            "edited), and with it the held-out split and the order; start a new run_dir"
        )
    # Frozen weights are not in the state: they are the base's, and already loaded.
    complete = all(p.requires_grad for p in engine.module.parameters())
    with _without_code(folder / TRAINING_STATE), settings_kept(engine):
        path, _ = engine.load_checkpoint(
            str(folder), tag=TRAINING_STATE, load_module_strict=complete
        )
    if path is None:
        raise UserError(
            f"{folder / TRAINING_STATE} holds no training state; resume from another checkpoint"
        )
    return training["step"]


@contextmanager
def _without_code(state: Path) -> Iterator[None]:
    """While DeepSpeed reads its files: no pickle runs anything but tensors and the three plain
    classes that DeepSpeed stores.

    Raises:
        UserError: a file asks for something else; it is named, and has not been run.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    force = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load obeys it, whatever its caller says
    before = os.environ.get(force)
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        for path in sorted(state.rglob("*.pt")):
            _refuse_code(path)
        os.environ[force] = "1"
        try:
            yield
        except pickle.UnpicklingError as error:  # torch's words would advise to trust the file
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"would run {found[1]}" if found else "is damaged, or holds code"
            raise UserError(
                f"a file in {state} {what}: it is refused; resume from a checkpoint that you trust"
            ) from error
        finally:
            os.environ.pop(force)
            if before is not None:
                os.environ[force] = before


def _refuse_code(path: Path) -> None:
    """UserError names the file and what it would run; `torch.load` refuses to run it anyway."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a damaged file can make it raise anything
        raise UserError(
            f"{path} is not a training state that DeepSpeed wrote ({str(error)[:200]}); resume "
            "from another checkpoint"
        ) from error
    if unsafe:
        raise UserError(
            f"{path} would run {', '.join(sorted(unsafe))} when it is read, which DeepSpeed's own "
            "files never do: it is "
            "refused and nothing was run. Resume from a checkpoint that you trust"
        )


def check_resumable(config: TrainConfig, world_size: int, folder: Path) -> None:
    """UserError names the settings that differ from those of the run in `folder`."""
    stored = read_config(folder, with_state=True)["training"]
    check_settings(config, stored["config"], folder)
    check_state(config, world_size, stored, folder)


@contextmanager
def owned(config: TrainConfig, processes: Processes) -> Iterator[None]:
    """Hold the run folder for this run alone. Every process calls it.

    Raises:
        UserError: another run is in it, or it cannot be written to.
    """
    with ExitStack() as stack:

        def take() -> None:
            if config.resume and not config.run_dir.exists():
                raise UserError(f"--resume: {config.run_dir} holds no run; start without --resume")
            stack.enter_context(owning(config.run_dir, "run folder"))

        processes.on_main(take)
        yield


def claim_run_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; refuses to overwrite another run.
    Writes nothing.

    Raises:
        UserError: run_dir has a run and --resume is not given, or --resume is given and there is
            nothing to resume; it cannot be written to.
    """
    writable_folder(config.run_dir, make=False)
    if config.resume:
        if found := newest_healthy(config.run_dir, with_state=True):
            return found
        settings = config.run_dir / "config.json"
        if not settings.is_file():
            raise UserError(f"--resume: {config.run_dir} holds no run; start without --resume")
        check_settings(config, read_json(settings), config.run_dir)
        log.warning("%s was stopped before its first checkpoint: starting again", config.run_dir)
        return None
    if run_checkpoints(config.run_dir) or (config.run_dir / "metrics.jsonl").exists():
        raise UserError(
            f"{config.run_dir} already holds a run; give --resume to go on, or another --run-dir"
        )
    return None


def set_aside_damaged(run_dir: Path, newest: Path) -> None:
    """Rename the damaged checkpoints after the one that is resumed from, so that none counts."""
    found = run_checkpoints(run_dir)
    for folder in found[found.index(newest) + 1 :]:
        damaged = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(folder, damaged)

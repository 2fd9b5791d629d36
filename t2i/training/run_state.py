"""Checkpoints of a run: one folder per step with the model and the training state, either complete
or absent.

    run_dir/checkpoints/step_000100/            as in t2i.checkpoint, plus
    run_dir/checkpoints/step_000100/training_state/   as in t2i.training.state
    run_dir/best/                               the model with the lowest held-out loss, alone

Noise, data order, dropout and learning rates are functions of the step, so no other state of the
loop needs saving.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.checkpoint import new_checkpoint, write_model
from t2i.checkpoint_folders import (
    BEST,
    is_run,
    newest_healthy,
    read_config,
    run_checkpoints,
    step_folders,
)
from t2i.errors import UserError
from t2i.fields import plain, read_object
from t2i.files import (
    PARTIAL,
    REPLACED,
    partial_folder,
    read_json,
    saving,
    settle_folder,
    writable_folder,
)
from t2i.manifest import TRAINING_STATE, refuse_in_checkpoint
from t2i.ownership import owning, remove_leftovers
from t2i.processes import Processes
from t2i.tensorar.model import TensorAR
from t2i.training.average import Average
from t2i.training.batches import TrainingData
from t2i.training.config import METRICS, TrainConfig
from t2i.training.engine import whole_weights
from t2i.training.run_plan import least_held_out
from t2i.training.settings import check_settings, refuse_different, state_facts, warn_of_rounding
from t2i.training.state import StoredState, write_state

log = logging.getLogger(__name__)

_OVERWRITTEN = ("config.json", "index.html", "checkpoints", BEST)
"""What a run overwrites or deletes in its folder."""


@dataclass
class Checkpoints:
    """Writes the checkpoints of a run; every rank calls its methods.

    Attributes:
        steps: number of steps of the whole run.
        data_key: identifies the data's content.
        average: the saved model has its weights, if there are any.
        facts: further facts about the run to store in checkpoints.
    """

    engine: Any
    model: TensorAR
    config: TrainConfig
    processes: Processes
    steps: int
    data_key: str
    average: Average
    facts: dict

    def __post_init__(self):
        # Once: the DeepSpeed file that it reads may be gone by the time of a save.
        self._state = state_facts(self.config, self.processes.world_size)

    def folder(self, step: int) -> Path:
        """The folder of the checkpoint after step `step`."""
        return self.config.run_dir / "checkpoints" / f"step_{step:06d}"

    def save(self, step: int) -> Path:
        """Save after step `step`, and delete the oldest checkpoints.

        Raises:
            UserError: the disk is full.
            NotFiniteError: the optimizer's state is not finite.
        """
        folder = self.folder(step)

        def write_training_state(partial: Path) -> None:
            state = partial / TRAINING_STATE
            write_state(self.engine, self.model, self.average.weights, state, self.processes)

        self._write(folder, {"step": step}, write_training_state)
        if self.processes.is_main:
            for old in run_checkpoints(self.config.run_dir)[: -self.config.log.keep_last]:
                try:  # it loses its name first, so that a kill leaves no half of a checkpoint
                    os.rename(old, left := partial_folder(old))
                    shutil.rmtree(left)
                except OSError as error:  # for example a file that is open elsewhere, on NFS
                    log.warning("%s cannot be deleted (%s)", old, error)
        self.processes.barrier()
        return folder

    def save_best(self, step: int, loss: float) -> None:
        """Save the model, without training state, as the best one so far."""
        self._write(self.config.run_dir / BEST, {"step": step, "best_loss": loss})

    def best_loss(self) -> float:
        """The loss of the best model saved so far; infinite if there is none."""

        def read() -> float:
            folder = self.config.run_dir / BEST
            try:
                facts = read_config(folder, contents=True)["training"]
                loss, of_data = float(facts["best_loss"]), facts.get("data_key")
                # Neither the loss of a run on other data nor -inf may keep new models from `best`.
                return loss if math.isfinite(loss) and of_data == self.data_key else math.inf
            except (ValueError, KeyError, TypeError):  # none yet, or damaged: replace it
                return math.inf

        return self.processes.on_main(read)

    def _write(
        self, folder: Path, facts: dict, rest: Callable[[Path], None] = lambda partial: None
    ) -> None:
        """Write a whole checkpoint folder or none; `rest` writes the files that ranks share out."""
        config, processes = self.config, self.processes
        training = {
            **facts,
            **self.facts,
            "steps": self.steps,
            "state": self._state,
            "data_key": self.data_key,
            "config": plain(config),
        }

        def write_weights() -> None:
            with saving(folder):
                write_model(
                    self.model,
                    partial,
                    tuning=config.tuning,
                    image_layers=config.train_image_layers,
                    training=training,
                )

        # A failure in one process is raised by all, so that none waits for one that has ended.
        with ExitStack() as stack:
            partial = processes.on_main(lambda: stack.enter_context(new_checkpoint(folder)))
            with self.average.applied(), whole_weights(self.model, config.engine.zero_stage):
                processes.on_main(write_weights)
            rest(partial)
            processes.on_main(stack.close)


def advice(run_dir: Path) -> str:
    """Advice for a run whose numbers are not finite, naming the newest checkpoint."""
    found = run_checkpoints(run_dir)
    left = f"the newest healthy checkpoint is {found[-1]}" if found else "there is no checkpoint"
    return f"{left}. Lower the learning rates, or train in fp32"


def resumed_state(
    model: TensorAR, config: TrainConfig, folder: Path, data: TrainingData
) -> StoredState:
    """The training state to resume from (see also `check_resumable`); copies its weights into the
    model.
    """
    assert data.plan.samples is not None, "the data are open"
    # Older versions recorded the least number, even if images with several captions raised it.
    recorded = {data.plan.held_out, least_held_out(config, data.plan.samples)}
    _refuse_other_split(config.run_dir, data.plan.held_out, recorded)
    if read_config(folder)["training"]["data_key"] != data.key:
        raise UserError(
            f"cannot resume {folder}: the data set has changed since (files were added, removed or "
            "edited, or this version reads it differently), and with it the held-out split and the "
            "order; start a new run_dir"
        )
    state = StoredState(folder / TRAINING_STATE, model)
    state.load_weights()
    return state


def _refuse_other_split(run_dir: Path, held_out: int, recorded: set[int]) -> None:
    """UserError if the run held out other samples than it would now, since an older version chose
    their number differently. recorded: the numbers that mean the same split.
    """
    try:
        plan = read_object(run_dir / "config.json").get("plan")
    except UserError:  # checkpoints can be resumed without it
        return
    before = plan.get("held_out", held_out) if isinstance(plan, dict) else held_out
    if before not in recorded:
        raise UserError(
            f"cannot resume {run_dir}: it held out {before} samples, but now {held_out} would be "
            "held out, and it would train on samples that it is validated on; start a new run_dir "
            f"from its weights, with --backbone.weights {run_dir}"
        )


def check_resumable(config: TrainConfig, world_size: int, folder: Path) -> None:
    """UserError if a setting differs from the checkpoint's but must not; warns if it may."""
    stored = read_config(folder, with_state=True)["training"]
    check_settings(config, stored["config"], folder)
    if config.steps is not None:
        steps_done(config, folder, config.steps)
    warn_of_rounding(config, world_size, stored, folder)


def steps_done(config: TrainConfig, folder: Path, steps: int) -> int:
    """The steps that a run has done; UserError if these are more than it is to have in all."""
    done = read_config(folder)["training"]["step"]
    if done > steps:
        raise UserError(
            f"{config.run_dir} has done {done} steps already, more than the {steps} asked for"
        )
    return done


def all_done(steps: int) -> str:
    """What to say of a run that is to have no more steps than it has done."""
    return f"all {steps} steps are done; give more --steps (or --epochs) to continue"


@contextmanager
def owned(config: TrainConfig, processes: Processes) -> Iterator[None]:
    """Reserve the run folder for this run. Every process calls it."""
    with ExitStack() as stack:

        def take() -> None:
            if config.resume and not config.run_dir.exists():
                raise UserError(f"--resume: {config.run_dir} holds no run; start without --resume")
            refuse_in_checkpoint(config.run_dir, "run_dir")
            stack.enter_context(owning(config.run_dir, "run folder"))
            _refuse_foreign(config.run_dir)
            if is_run(config.run_dir):
                remove_leftovers(config.run_dir)
            # A kill in the middle of a save leaves partial folders.
            left = (config.run_dir / "checkpoints").glob("step_*.*")
            saved = {path.with_suffix("") for path in left if path.suffix in (PARTIAL, REPLACED)}
            for folder in (config.run_dir / BEST, *saved):
                settle_folder(folder)

        refuse_different(config, processes)
        processes.on_main(take)
        yield


def _has_results(run_dir: Path) -> bool:
    """Whether a run has logged or saved anything in this folder."""
    return bool(run_checkpoints(run_dir)) or (run_dir / METRICS).exists()


def _refuse_foreign(run_dir: Path) -> None:
    """UserError if a run would overwrite or delete files that no run has written."""
    if _has_results(run_dir) or is_run(run_dir):
        return
    paths = (run_dir / name for name in _OVERWRITTEN)
    if found := [p.name for p in paths if p.is_file() or (p.is_dir() and any(p.iterdir()))]:
        raise UserError(
            f"{run_dir} holds {', '.join(found)}, which a run would overwrite or delete, and does "
            "not look like a run folder; give another --run-dir"
        )


def claim_run_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run; refuses to overwrite another run.
    Writes nothing.

    Raises:
        UserError: run_dir holds a run and --resume is not given; there is nothing to resume; or
            run_dir cannot be written to.
    """
    refuse_in_checkpoint(config.run_dir, "run_dir")
    for inside in ("", "checkpoints", "samples"):
        writable_folder(config.run_dir / inside, make=False)
    _refuse_foreign(config.run_dir)
    if config.resume:
        if found := newest_healthy(config.run_dir, with_state=True):
            return found
        settings = config.run_dir / "config.json"
        if not settings.is_file():
            raise UserError(f"--resume: {config.run_dir} holds no run; start without --resume")
        check_settings(config, read_json(settings), config.run_dir)
        log.warning("%s was stopped before its first checkpoint: starting again", config.run_dir)
        return None
    if _has_results(config.run_dir):
        raise UserError(
            f"{config.run_dir} already holds a run; give --resume to continue it, or another "
            "--run-dir"
        )
    return None


def set_aside_damaged(run_dir: Path, newest: Path) -> None:
    """Rename the damaged checkpoints newer than the one resumed from, so that they are ignored."""
    found = step_folders(run_dir)
    for folder in found[found.index(newest) + 1 :]:
        damaged = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(folder, damaged)

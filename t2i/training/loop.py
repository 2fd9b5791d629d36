"""The training loop: `train` starts or resumes a run, and takes its steps (`training_run.py`)."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i.checkpoint_folders import run_checkpoints
from t2i.errors import Stopped, UserError
from t2i.launcher import handling, stop_signals
from t2i.processes import peak_gb
from t2i.progress import progress_bar
from t2i.pytorch_defaults import usual_defaults
from t2i.training import run_state
from t2i.training.config import TrainConfig
from t2i.training.engine import start_processes
from t2i.training.run_page import refresh_run_page
from t2i.training.settings import settings_of
from t2i.training.training_run import Run

log = logging.getLogger(__name__)
_ONE_REQUEST_SECONDS = 2.0


@usual_defaults()
def train(config: TrainConfig, kind: type[Run] = Run) -> Path:
    """Start or resume a run of this kind; returns its last checkpoint folder.

    Raises:
        UserError: something in the configuration or the data is wrong, run_dir is in use, the disk
            is full, or config.check is set (call `t2i.check` instead).
        NotFiniteError: loss, gradient or weights are no longer finite; they are not saved.
        Stopped: on request (Ctrl-C, SIGTERM, SIGHUP), after saving; it is a KeyboardInterrupt.
    """
    if settings_of(config, "t2i.train").check:
        raise UserError(
            "check=True is for checking a run, but t2i.train trains: use print(t2i.check(config)) "
            "to see what would happen, or leave check out to train"
        )
    if kind is Run and not config.learns_from_data:
        raise UserError(
            "t2i.train learns from data, but these are the settings of reward fine-tuning, which "
            "learns from images that the model draws: use launch/train_reward.py"
        )
    with run_state.owned(config, start_processes()):
        return _train(kind(config))


def _train(run: Run) -> Path:
    config, plan = run.config, run.plan
    if config.log.at_start and run.step == 0:
        run.first_look()
    run.catch_up()
    started, first = time.perf_counter(), run.step
    run.learning_mode()
    if first == plan.steps and run.processes.is_main:
        log.warning(run_state.all_done(plan.steps))
    bar = progress_bar(
        total=plan.steps,
        initial=first,
        desc="training",
        unit="step",
        disable=not run.processes.is_main,
    )
    with bar, _stop_on_signals(run), run.watch:
        while run.step < plan.steps and not run.stop_agreed:
            metrics = run.train_step()
            rate = (run.step - first) * config.batch_size / (time.perf_counter() - started)
            validated = plan.due(plan.validate_every, run.step)
            if validated:
                metrics |= run.validate()
            if run.processes.is_main:
                shown = {run.shown.rpartition("/")[2]: f"{metrics[run.shown]:.3f}"}
                shown["images_s"] = f"{rate:.1f}"
                bar.set_postfix(shown, refresh=False)  # update() redraws, but not at every step
                bar.update()
                if validated or plan.due(plan.log_every, run.step):
                    memory = {"memory_gb": peak_gb(run.processes.device)}
                    run.metrics.log(run.step, metrics | {"images_per_s": rate} | memory)
            saved = run.stop_agreed or plan.due(plan.save_every, run.step)
            if saved:
                run.save()
            if validated:  # after the checkpoint, which matters more if the disk is full
                run.keep_if_best(metrics)
            stopped = run.stop_agreed and run.step < plan.steps
            if run.sheet_due() and not stopped:  # resuming draws it
                run.sample_sheet()
            if run.processes.is_main and (validated or saved):
                refresh_run_page(config.run_dir)
    if run.step < plan.steps:
        raise Stopped(f"saved after step {run.step}; the same command with --resume continues")
    return run_checkpoints(config.run_dir)[-1]


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal save after the current step and stop the run; a second
    Ctrl-C ends it at once.
    """
    asked = math.inf

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        # Ctrl-C in a terminal reaches a rank twice, directly and passed on by the launcher: signals
        # so close together count as one request.
        if number == signal.SIGINT and time.monotonic() > asked + _ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt
        asked = min(asked, time.monotonic())
        run.stop_requested = True

    with handling((signal.SIGINT, *stop_signals()), ask):
        yield

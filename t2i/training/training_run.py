"""A training run in progress: builds what it needs, steps, validates, draws sheets and saves."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from t2i.checkpoint import from_pretrained
from t2i.checkpoint_folders import find_checkpoint
from t2i.errors import NotFiniteError
from t2i.fields import plain
from t2i.files import saving, write_json
from t2i.generation import draw_images
from t2i.imaging import grid, save_png
from t2i.products import fast_products
from t2i.rng import make_keys
from t2i.sampling import DrawOptions
from t2i.tensorar.loss import SlotLosses
from t2i.tensorar.model import TensorAR
from t2i.training import run_state
from t2i.training.average import Average
from t2i.training.batches import Batch, TrainingData
from t2i.training.check import look_at_model, look_before_work
from t2i.training.config import TrainConfig
from t2i.training.engine import (
    TrainingLoss,
    autocast,
    grad_norm,
    healthy_norm,
    set_rates,
    start_engine,
    start_processes,
    whole_weights,
)
from t2i.training.logs import MetricsLog
from t2i.training.memory import SHEET_IMAGES, SHEET_PROMPTS, sheet_images
from t2i.training.run_page import refresh_run_page
from t2i.training.run_plan import about_settings
from t2i.training.start import build_model
from t2i.training.state import trained
from t2i.training.validation import validate
from t2i.training.watch import PeerWatch

BEST_BY = "validation/own_drafts/slot0"
"""The loss that decides which model is best: of the final codes, with the model's own drafts."""

log = logging.getLogger(__name__)


class Run:
    """A run in progress: all state shared by its steps."""

    shown = "train/loss"
    """The metric shown next to the progress bar."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.processes = processes = start_processes()
        checkpoint = processes.on_main(lambda: run_state.claim_run_dir(config))
        # Files may be missing on one machine only.
        source, _ = processes.together(
            lambda: look_before_work(config, processes.world_size, checkpoint)
        )
        own_facts = processes.on_main(lambda: self.facts(checkpoint))
        model = processes.together(lambda: build_model(config, resumed=checkpoint))
        self.model = model.to(processes.device)
        prompts = look_at_model(self.model, config)
        self._place_helpers()
        self.data = TrainingData(config, self.model.backbone, processes, source)
        self.plan = self.data.plan
        self.prompts = prompts or self.data.held_out_conditions(SHEET_PROMPTS)
        self.step, state = 0, None
        if checkpoint is not None:
            state = run_state.resumed_state(self.model, config, checkpoint, self.data)
            self.step = run_state.steps_done(config, checkpoint, self.plan.steps)
        self.engine = start_engine(self.model, config, processes, self.loss_module())
        self.average = Average(self.model, config.ema)
        if state is not None:
            state.load_optimizer(self.engine)
            self.average.weights = state.average()
        self.stop_requested = self.stop_agreed = False
        self.watch = PeerWatch(processes)
        self.checkpoints = run_state.Checkpoints(
            self.engine,
            self.model,
            config,
            processes,
            steps=self.plan.steps,
            data_key=self.data.key,
            average=self.average,
            facts=own_facts,
        )
        self.best_loss = self.checkpoints.best_loss()
        self.seconds = self.waited = 0.0
        """Time spent in this process's steps, and the part of it spent waiting for data."""
        if processes.is_main:
            if checkpoint is not None:
                run_state.set_aside_damaged(config.run_dir, checkpoint)
            else:
                for warning in about_settings(config, self.plan):
                    log.warning(warning)
            config.run_dir.mkdir(parents=True, exist_ok=True)
            settled = {"plan": asdict(self.plan), "sheet_prompts": self.prompts}
            write_json(config.run_dir / "config.json", plain(config) | settled)
            self.metrics = MetricsLog(config, self.step)

    def facts(self, checkpoint: Path | None) -> dict:
        """Further facts that this kind of run stores in its checkpoints, compared with those in
        `checkpoint` if the run is resumed. Called in the main process.
        """
        return {}

    def loss_module(self) -> nn.Module:
        """The module that DeepSpeed wraps."""
        return TrainingLoss(self.model, self.config.engine.precision)

    def learning_mode(self) -> None:
        """Put the model into the mode in which steps are taken."""
        self.model.train()

    def _place_helpers(self) -> None:
        backbone, device = self.model.backbone, self.processes.device
        backbone.tokenizer.to(device)
        if backbone.frozen.text_encoder is not None:  # classes need none
            backbone.frozen.text_encoder.to(device)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics, over the samples of all ranks."""
        with self.watch.step(), fast_products(self.processes.device, self.model.windows.tokens):
            return self._train_step()

    def _train_step(self) -> dict[str, float]:
        config, started = self.config, time.perf_counter()
        rates = set_rates(self.engine, config, self.step, self.plan.steps)
        # Only dropout uses torch's global generator: seeding it per step makes resuming exact.
        torch.manual_seed(int(make_keys(config.seed, self.step, self.processes.rank)) & (2**63 - 1))
        parts: list[tuple[Tensor, SlotLosses]] = []
        for batch in self._timed(self.data.micro_batches(self.step)):
            loss, sums, counts = self.engine(batch)
            self.engine.backward(loss)
            parts.append((batch.indices, SlotLosses(sums, counts)))
            if self.engine.is_gradient_accumulation_boundary():
                norm = grad_norm(self.engine)
                total = self._healthy(parts, norm)  # raises before any weight is touched
            self.engine.step()
        total_norm = self._count_step(norm)
        if not healthy_norm(total_norm):
            self._refuse_batch(parts, total, self.step)
        self.seconds += time.perf_counter() - started
        means = total.means().tolist()
        if self.step == 1 and self.processes.is_main:
            self._look_at_base(means[0])
        return {
            "train/loss": float(total.weighted(config.method.weights())),
            **{f"train/slot{j}": m for j, m in enumerate(means)},
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **({} if total_norm is None else {"train/grad_norm": total_norm}),
            "data_wait": self.waited / self.seconds,
        }

    def _look_at_base(self, loss: float) -> None:
        """Warn if slot 0's loss in the first step, the base's own, is no better than chance."""
        chance = sum(map(math.log, self.model.backbone.spec.subvocabs))
        if loss >= chance and self.config.method.residual != "none":
            log.warning(
                f"the loss of the first step is {loss:.2f} nats per code, and guessing has "
                f"{chance:.2f}: do these weights and this image tokenizer belong together?"
            )

    def _count_step(self, norm: Tensor | None) -> float | None:
        """Count a step that was taken; returns the norm of its gradient, None if unknown."""
        self.step += 1
        self.average.update(self.step)
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return None if norm is None else float(norm)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and add the time spent waiting for them to `self.waited`."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _healthy(self, parts: list[tuple[Tensor, SlotLosses]], norm: Tensor | None) -> SlotLosses:
        """The losses of the whole batch, on the CPU.

        Raises:
            NotFiniteError: a loss is not finite, or the norm of the gradient, if known, is not.
        """
        k, losses = self.config.method.k, [part for _, part in parts]
        sums = reduce(add, (p.sums for p in losses))
        counts = reduce(add, (p.counts for p in losses))
        found, healthy = self._agree(torch.cat([sums, counts]), norm)
        total = SlotLosses(*found.split(k))
        if not healthy:
            self._refuse_batch(parts, total, self.step + 1)
        return total

    def _agree(self, sums: Tensor, norm: Tensor | None) -> tuple[Tensor, bool]:
        """Numbers summed over all processes, on the CPU, and whether they and all norms are finite.

        Also agrees on `stop_agreed`, since a signal may reach the processes at different steps.
        """
        bad = sums.new_tensor(0.0) if norm is None else (~norm.isfinite()).to(sums)
        stop = sums.new_tensor(float(self.stop_requested))
        message = self.processes.total(torch.cat([sums, torch.stack([bad, stop])]))
        self.stop_agreed = bool(message[-1] > 0)
        return message[:-2], bool(message[-2] == 0 and message.isfinite().all())

    def _refuse_batch(
        self, parts: list[tuple[Tensor, SlotLosses]], total: SlotLosses, step: int
    ) -> NoReturn:
        """Raise NotFiniteError with the step and the samples whose loss is not finite (if there are
        none, all of the batch).
        """
        finite = bool(total.sums.isfinite().all())
        named = [i for i, losses in parts if not losses.sums.isfinite().all()]
        if not self.processes.any(bool(named)):
            named = [i for i, _ in parts]
        everywhere = [i for rank in self.processes.gather(named) for i in rank]
        what = "gradient" if finite else "loss"
        raise NotFiniteError(
            f"the {what} is not finite at step {step}, with the samples "
            f"{self.data.names(torch.cat(everywhere))}; {run_state.advice(self.config.run_dir)}"
        )

    def validate(self) -> dict[str, float]:
        """Held-out losses; every rank calls it."""
        with self.average.applied(), autocast(self.config.engine.precision, self.processes.device):
            metrics = validate(self.model, self.data).metrics()
        if not all(map(math.isfinite, metrics.values())):
            raise NotFiniteError(
                f"the held-out loss is not finite after step {self.step} ({metrics}); "
                f"{run_state.advice(self.config.run_dir)}"
            )
        return metrics

    def sheet_due(self) -> bool:
        plan, sharded = self.plan, self.config.engine.zero_stage == 3
        # Sharded weights cannot draw: the checkpoint just written does.
        every = plan.save_every if sharded else plan.sample_every
        return plan.sample_every > 0 and plan.due(every, self.step)

    def sheet_path(self) -> Path:
        return self.config.run_dir / "samples" / f"step_{self.step:06d}.png"

    def sample_sheet(self) -> None:
        """Draw a sheet in the main process; every rank calls it."""
        self.check_weights()
        self.processes.on_main(self.draw_sheet)

    def draw_sheet(self) -> None:
        """Draw the fixed prompts with the fixed seed, one row each."""
        prompts, model = self.prompts, self._whole_model().eval()
        # Eager, since the faster ways keep memory between sheets.
        drawing = DrawOptions(batch_size=sheet_images(model, len(prompts)), speed="eager")
        with self.average.applied():
            drawn = draw_images(
                model, prompts, drawing, samples_per_prompt=SHEET_IMAGES, progress=False
            )
            images = [one.image for one in drawn]
        labels = [text for prompt in prompts for text in (str(prompt), "")]
        with saving(self.sheet_path()):
            save_png(grid(images, columns=2, labels=labels), self.sheet_path())
        self.learning_mode()

    def first_look(self) -> None:
        """Validate before the first step, and draw a sheet (except under ZeRO-3)."""
        metrics = self.validate()
        if self.plan.sample_every and self.config.engine.zero_stage < 3:
            self.sample_sheet()
        if self.processes.is_main:
            self.metrics.log(0, metrics)
            refresh_run_page(self.config.run_dir)

    def _whole_model(self) -> TensorAR:
        """A model that one process can draw with: under ZeRO-3, the checkpoint just written."""
        if self.config.engine.zero_stage < 3:
            return self.model
        dtype = next(self.model.parameters()).dtype
        folder = find_checkpoint(self.config.run_dir)
        return from_pretrained(folder, dtype=dtype, device=self.processes.device)

    def check_weights(self) -> None:
        """NotFiniteError if a trained weight is not finite; every rank calls it before any use."""
        with whole_weights(self.model, self.config.engine.zero_stage):
            finite = all(bool(p.isfinite().all()) for p in trained(self.model).values())
        if self.processes.any(not finite):
            raise NotFiniteError(
                f"weights are not finite after step {self.step}, so they are not saved; "
                f"{run_state.advice(self.config.run_dir)}"
            )

    def save(self) -> Path:
        """Write a checkpoint folder and delete the oldest ones."""
        self.check_weights()
        return self.checkpoints.save(self.step)

    def judged_by(self, metrics: dict[str, float]) -> float:
        """The number in a validation's metrics by which models are compared; lower is better."""
        return metrics[BEST_BY]

    def keep_if_best(self, metrics: dict[str, float]) -> None:
        """Save the model in run_dir/best if no earlier validation was as good."""
        loss = self.judged_by(metrics)
        if self.config.log.keep_best and loss < self.best_loss:
            self.check_weights()
            self.best_loss = loss
            self.checkpoints.save_best(self.step, loss)

    def catch_up(self) -> None:
        """Do what a stop or a kill after the checkpoint, at the same step, left undone."""
        if found := self.processes.on_main(lambda: self.metrics.validated):
            self.keep_if_best(found)
        drawn = self.processes.on_main(self.sheet_path().is_file)
        if self.step > 0 and self.sheet_due() and not drawn:
            self.sample_sheet()
            if self.processes.is_main:  # no step may follow that would do it
                refresh_run_page(self.config.run_dir)

"""The training run: build, step, validate, sample, save. `launch/train_*.py` parse a `TrainConfig` and call `train`."""

import logging
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch

from t2i.generation import iterate_images
from t2i.imaging import grid, save_png
from t2i.loading import load_backbone
from t2i.lora import add_lora
from t2i.rng import make_keys
from t2i.tensorar.model import TensorAR
from t2i.training import run_state
from t2i.training.config import TrainConfig
from t2i.training.data import TrainingData
from t2i.training.engine import set_rates, start_engine, start_processes
from t2i.training.logs import MetricsLog
from t2i.training.run_page import write_run_page
from t2i.training.validation import validate
from t2i.weights import write_json

log = logging.getLogger(__name__)


def build_model(config: TrainConfig) -> TensorAR:
    """The backbone with a fresh codec (and adapters), with exactly the chosen parameters trainable."""
    options = config.backbone
    backbone = load_backbone(
        options.family,
        options.weights,
        tokenizer=options.tokenizer,
        text_encoder=options.text_encoder,
    )
    model = TensorAR(backbone, config.method, seed=config.seed)
    backbone.requires_grad_(config.tuning == "full")
    if config.tuning == "lora":
        add_lora(backbone, config.lora)
    backbone.token_dropout.p = config.token_dropout
    backbone.gradient_checkpointing = config.engine.gradient_checkpointing
    if config.sampling is not None:
        model.sampling = config.sampling
    return model


class Run:
    """A run in progress: everything that the steps share."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.processes = processes = start_processes()
        checkpoint = run_state.claim_run_dir(config)
        if checkpoint is not None:
            run_state.check_resumable(config, processes.world_size, checkpoint)
        self.model = build_model(config).to(processes.device)
        self._place_helpers()
        self.data = TrainingData(config, self.model.backbone, processes)
        self.steps = self.data.steps()
        self.engine = start_engine(self.model, config, processes)
        self.step = (
            0
            if checkpoint is None
            else run_state.resume(self.engine, config, processes, checkpoint)
        )
        self.stop_requested = False
        if processes.is_main:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(config.run_dir / "config.json", run_state.plain(asdict(config)))
            self.metrics = MetricsLog(
                config.run_dir,
                self.step,
                config.log.tracker,
                config.log.project,
                run_state.plain(asdict(config)),
            )

    def _place_helpers(self) -> None:
        frozen, device = self.model.backbone.frozen, self.processes.device
        frozen.tokenizer.to(device)
        frozen.text_encoder.to(device)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics (this rank's losses)."""
        config, model = self.config, self.model
        rates = set_rates(self.engine, config, self.step, self.steps)
        # Dropout is the one user of torch's global generator: seeding it per step makes resume exact.
        torch.manual_seed(int(make_keys(config.seed, self.step, self.processes.rank)) & (2**63 - 1))
        sums = counts = 0
        for batch in self.data.micro_batches(self.step):
            windows = model.noised_windows(batch.codes, batch.keys)
            loss, batch_sums, batch_counts = self.engine(batch, windows)
            self.engine.backward(loss)
            self.engine.step()
            sums, counts = sums + batch_sums, counts + batch_counts
        self.step += 1
        means = (sums / counts).tolist()
        if not all(m == m and abs(m) != float("inf") for m in means):
            raise FloatingPointError(
                f"the loss is not finite at step {self.step} ({means}); the last checkpoint is untouched. "
                "Lower the learning rates, or train in fp32"
            )
        weights = torch.tensor(config.method.weights())
        total = float((weights * torch.tensor(means)).sum() / weights.sum())
        return {
            "train/loss": total,
            **{f"train/slot{j}": m for j, m in enumerate(means)},
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **self._grad_norm(),
        }

    def _grad_norm(self) -> dict[str, float]:
        norm = self.engine.get_global_grad_norm()  # DeepSpeed keeps none without ZeRO
        return {} if norm is None else {"train/grad_norm": float(norm)}

    def validate(self) -> dict[str, float]:
        """Held-out losses; every rank calls it."""
        return validate(self.model, self.data).metrics()

    def sample_sheet(self) -> None:
        """Draw the fixed prompts with the fixed seed, one column per prompt; the main process draws, the others wait."""
        if self.processes.is_main:
            self.model.eval()
            prompts = self.config.log.prompts
            images = [
                g.image
                for g in iterate_images(
                    self.model,
                    prompts,
                    samples_per_prompt=2,
                    batch_size=2 * len(prompts),
                    progress=False,
                )
            ]
            sheet = grid(images, columns=2, labels=[p for prompt in prompts for p in (prompt, "")])
            save_png(sheet, self.config.run_dir / "samples" / f"step_{self.step:06d}.png")
            self.model.train()
        self.processes.barrier()

    def save(self) -> Path:
        return run_state.save(
            self.engine, self.model, self.config, self.processes, self.step, self.steps
        )


def train(config: TrainConfig) -> Path:
    """Run (or resume) a training; returns the last checkpoint folder.

    Raises:
        ValueError: something in the configuration or the data is wrong; nothing was written to run_dir then.
    """
    from tqdm import tqdm

    run = Run(config)
    log_options = config.log
    previous = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop_requested", True))
    bar = tqdm(
        total=run.steps,
        initial=run.step,
        desc="training",
        unit="step",
        disable=not run.processes.is_main,
    )
    folder, started, first = None, time.perf_counter(), run.step
    run.model.train()
    with bar:
        while run.step < run.steps:
            metrics = run.train_step()
            elapsed = time.perf_counter() - started
            rate = (run.step - first) * config.batch_size / elapsed
            done = run.step == run.steps
            if (
                log_options.validate_every and (run.step % log_options.validate_every == 0)
            ) or done:
                metrics |= run.validate()
            if run.processes.is_main:
                bar.update()
                bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", images_s=f"{rate:.1f}")
                if (
                    run.step % log_options.log_every == 0
                    or done
                    or "validation/own_drafts/slot0" in metrics
                ):
                    run.metrics.log(run.step, metrics | {"images_per_s": rate})
            if (
                log_options.sample_every
                and (run.step % log_options.sample_every == 0 or done)
                and config.engine.zero_stage < 3
            ):
                run.sample_sheet()
            if run.step % log_options.save_every == 0 or done or run.stop_requested:
                folder = run.save()
            if run.stop_requested:
                log.warning("stopped at step %d after a request; go on with --resume", run.step)
                break
    signal.signal(signal.SIGTERM, previous)
    if run.processes.is_main:
        write_run_page(config.run_dir)
    if folder is None:
        folder = run_state.checkpoints(config.run_dir)[-1]
    return folder

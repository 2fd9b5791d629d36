"""The training run: build, step, validate, sample, save. `launch/train_*.py` parse a `TrainConfig` and call `train`."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from t2i.backbones.base import Backbone
from t2i.checkpoint import find_checkpoint, from_pretrained, is_checkpoint, trained_parts
from t2i.errors import UserError
from t2i.files import write_json
from t2i.generation import conditions, iterate_images
from t2i.imaging import grid, save_png
from t2i.loading import load_backbone
from t2i.lora import add_lora
from t2i.progress import progress_bar
from t2i.rng import make_keys
from t2i.tensorar.model import SlotLosses, TensorAR
from t2i.training import run_state
from t2i.training.config import TrainConfig
from t2i.training.data import TrainingData
from t2i.training.engine import autocast, set_rates, start_engine, start_processes
from t2i.training.examples import check_backbone
from t2i.training.logs import MetricsLog, choose_tracker
from t2i.training.run_page import write_run_page
from t2i.training.start import start_from, take_codec
from t2i.training.validation import validate


def build_model(
    config: TrainConfig, *, device: str = "cpu", resumed: Path | None = None
) -> TensorAR:
    """The backbone with a fresh codec (and adapters), with exactly the chosen parameters trainable.

    Where the weights are an earlier run's, its codec is taken, too. A `resumed` run stands on its own checkpoint.
    """
    options = config.backbone
    loading = {
        "tokenizer": options.tokenizer,
        "text_encoder": options.text_encoder,
        "generation_only": options.generation_only,
        "dtype": torch.bfloat16 if config.engine.precision == "bf16" else torch.float32,
        "device": device,
    }
    earlier = resumed or options.weights
    if is_checkpoint(earlier):
        backbone = start_from(earlier, resumed=resumed is not None, **loading)
    else:
        dtype = options.text_encoder_dtype
        backbone = load_backbone(options.family, earlier, text_encoder_dtype=dtype, **loading)
    model = TensorAR(backbone, config.method, seed=config.seed)
    if resumed is None and is_checkpoint(earlier):
        take_codec(model, earlier)
    backbone.requires_grad_(False)
    if config.tuning == "lora":
        add_lora(backbone, config.lora, seed=config.seed)
    for module in _trained_whole(backbone, config):
        module.requires_grad_(True)
    backbone.token_dropout.p = config.token_dropout
    backbone.gradient_checkpointing = config.engine.gradient_checkpointing
    model.sampling = config.sampling.apply(model.sampling)
    model.trained = trained_parts(config.tuning, config.train_image_layers)
    return model


def _trained_whole(backbone: Backbone, config: TrainConfig) -> Sequence[nn.Module]:
    """The backbone's modules of which every parameter is trained."""
    if config.tuning == "full":
        return backbone.trained_modules()
    return tuple(backbone.image_layers().values()) if config.train_image_layers else ()


class Run:
    """A run in progress: everything that the steps share."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.processes = processes = start_processes()
        choose_tracker(config.log.tracker)
        checkpoint = run_state.claim_run_dir(config)
        if checkpoint is not None:
            run_state.check_resumable(config, processes.world_size, checkpoint)
        self.model = build_model(config, resumed=checkpoint).to(processes.device)
        check_backbone(self.model.backbone, config.data)
        self.prompts = conditions(self.model.backbone, config.log.prompts)
        self._place_helpers()
        self.data = TrainingData(config, self.model.backbone, processes)
        self.steps = self.data.steps()
        self.engine = start_engine(self.model, config, processes)
        self.step = (
            0
            if checkpoint is None
            else run_state.resume(self.engine, config, checkpoint, self.data.key)
        )
        if self.step > self.steps:
            raise UserError(
                f"{config.run_dir} has done {self.step} steps already, more than the {self.steps} asked for"
            )
        self.stop_requested = self.stop_agreed = False
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
        if frozen.text_encoder is not None:  # classes need none
            frozen.text_encoder.to(device)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics, over the samples of all ranks."""
        config = self.config
        rates = set_rates(self.engine, config, self.step, self.steps)
        # Dropout is the one user of torch's global generator: seeding it per step makes resume exact.
        torch.manual_seed(int(make_keys(config.seed, self.step, self.processes.rank)) & (2**63 - 1))
        total = SlotLosses(*torch.zeros(2, config.method.k, device=self.processes.device))
        for batch in self.data.micro_batches(self.step):
            loss, sums, counts = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            total = SlotLosses(total.sums + sums, total.counts + counts)
        self.step += 1
        total = self._over_ranks(total)
        means = total.means()
        if not means.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite at step {self.step} ({means.tolist()}); the last checkpoint is untouched. "
                "Lower the learning rates, or train in fp32"
            )
        return {
            "train/loss": float(total.weighted(config.method.weights())),
            **{f"train/slot{j}": m for j, m in enumerate(means.tolist())},
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **self._grad_norm(),
        }

    def _over_ranks(self, losses: SlotLosses) -> SlotLosses:
        """Sum over all ranks, as one message with their stop requests: a signal reaches them at different steps."""
        k = self.config.method.k
        stop = losses.sums.new_tensor([float(self.stop_requested)])
        message = torch.cat([losses.sums, losses.counts, stop])
        if self.processes.world_size > 1:
            dist.all_reduce(message)
        message = message.cpu()
        self.stop_agreed = bool(message[-1] > 0)
        return SlotLosses(message[:k], message[k : 2 * k])

    def _grad_norm(self) -> dict[str, float]:
        norm = self.engine.get_global_grad_norm()  # DeepSpeed keeps none without ZeRO
        return {} if norm is None else {"train/grad_norm": float(norm)}

    def validate(self) -> dict[str, float]:
        """Held-out losses; every rank calls it."""
        with autocast(self.config.engine.precision, self.processes.device):
            return validate(self.model, self.data).metrics()

    def sample_sheet(self) -> None:
        """Draw the fixed prompts with the fixed seed, one row per prompt; the main process draws, the others wait."""
        if self.processes.is_main:
            prompts, model = self.prompts, self._whole_model().eval()
            options = {"samples_per_prompt": 2, "batch_size": 2 * len(prompts), "progress": False}
            images = [generated.image for generated in iterate_images(model, prompts, **options)]
            sheet = grid(
                images, columns=2, labels=[p for prompt in prompts for p in (str(prompt), "")]
            )
            save_png(sheet, self.config.run_dir / "samples" / f"step_{self.step:06d}.png")
            self.model.train()
        self.processes.barrier()

    def _whole_model(self) -> TensorAR:
        """A model that one process can sample from: under ZeRO-3 that is the checkpoint that was just written."""
        if self.config.engine.zero_stage < 3:
            return self.model
        dtype = next(self.model.parameters()).dtype
        folder = find_checkpoint(self.config.run_dir)
        return from_pretrained(folder, dtype=dtype, device=self.processes.device)

    def save(self) -> Path:
        return run_state.save(
            self.engine,
            self.model,
            self.config,
            self.processes,
            self.step,
            self.steps,
            self.data.key,
        )


def train(config: TrainConfig) -> Path:
    """Run (or resume) a training; returns the last checkpoint folder.

    Raises:
        UserError: something in the configuration or the data is wrong; nothing was written to run_dir then.
        FloatingPointError: the loss is not finite any more.
        KeyboardInterrupt: stopped on request (Ctrl-C or SIGTERM), after a checkpoint.
    """

    run, options = Run(config), config.log
    started, first = time.perf_counter(), run.step
    run.model.train()
    bar = progress_bar(
        total=run.steps,
        initial=first,
        desc="training",
        unit="step",
        disable=not run.processes.is_main,
    )
    with bar, _stop_on_signals(run):
        while run.step < run.steps and not run.stop_agreed:
            metrics = run.train_step()
            done = run.step == run.steps
            rate = (run.step - first) * config.batch_size / (time.perf_counter() - started)
            validated = done or _due(options.validate_every, run.step)
            if validated:
                metrics |= run.validate()
            if run.processes.is_main:
                shown = {"loss": f"{metrics['train/loss']:.3f}", "images_s": f"{rate:.1f}"}
                bar.set_postfix(shown, refresh=False)  # by itself it would redraw at every step
                bar.update()
                if validated or _due(options.log_every, run.step):
                    run.metrics.log(run.step, metrics | {"images_per_s": rate})
            saved = done or run.stop_agreed or _due(options.save_every, run.step)
            if saved:
                run.save()
            sheet_due = (
                saved
                if config.engine.zero_stage == 3
                else _due(options.sample_every, run.step) or done
            )
            if options.sample_every and sheet_due and not run.stop_agreed:
                run.sample_sheet()
            if run.processes.is_main and (validated or saved):
                write_run_page(config.run_dir)
    if run.step < run.steps:
        raise KeyboardInterrupt(f"saved after step {run.step}; the same with --resume goes on")
    return find_checkpoint(config.run_dir)


def _due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a checkpoint after the step in progress, and then the end; a second Ctrl-C ends at once."""

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and run.stop_requested:
            raise KeyboardInterrupt
        run.stop_requested = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

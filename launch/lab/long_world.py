"""What the runs of `long_grid.py` share on one device, and how each run is trained and examined."""

import copy
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from launch.lab import long_judge
from launch.lab.long_arms import CONTROL, FALLING, objective
from launch.lab.long_data import (
    EncodedScenes,
    Order,
    drawn_scenes,
    every_caption_prepared,
    held_out_batches,
    order,
)
from launch.lab.long_grid import LongGrid, LongRun
from launch.lab.long_steps import WARM_UP, Trainer
from launch.lab.result_lines import TASKS, append
from t2i.data.order import split_indices
from t2i.errors import UserError
from t2i.evaluation.evidence import repairs, stage_changes
from t2i.files import json_sha256, writable_folder
from t2i.loading import load_backbone, pick_device
from t2i.models.base import Backbone
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.rng import make_keys
from t2i.shapes.shapes_source import SIZE
from t2i.sources import BackboneSource, expand_folder
from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.training.config import TrainConfig

AWAY_STEPS, AWAY_SAMPLES = 200, 6400
"""Limits of the training on own samples, which only has to give a direction."""
_COURSE_PARTS = 10


class GridWorld:
    """Bases, scenes and benchmark on the device, and processes that judge images."""

    def __init__(self, grid: LongGrid):
        self.grid, (self.device, _) = grid, pick_device(grid.device)
        torch.backends.cudnn.allow_tf32 = False  # it changes codes
        self.eager, self.side = threading.Lock(), self.new_stream()
        """The lock of the thread that launches operations eagerly, and the stream for them."""
        self.pool: Executor = (
            ProcessPoolExecutor(grid.workers, mp_context=get_context("forkserver"))
            if grid.workers
            else ThreadPoolExecutor(1)
        )
        self.unjudged: list[list[tuple[list[Future], dict]]] = []
        """By run, result lines that wait for verdicts; those of a run are written together."""
        folders = [base.partition("=")[::2] for base in grid.bases]
        self.backbones = {name: self._loaded(weights) for name, weights in folders}
        writable_folder(grid.out)
        first = next(iter(self.backbones.values()))
        assert isinstance(first.tokenizer, VQTokenizer), "LlamaGen has no other kind"
        self.tokenizer = first.tokenizer
        count = grid.images + grid.held_out
        files = expand_folder(BackboneSource(first.spec.family, folders[0][1]))
        assert files.tokenizer is not None, "scenes cannot be encoded without it"
        scenes = drawn_scenes(first, Path(files.tokenizer), count, grid.out, grid.workers)
        self.scenes: dict[str, EncodedScenes] = {
            name: replace(scenes, prepared=every_caption_prepared(backbone))
            for name, backbone in self.backbones.items()
        }
        self.benchmark = long_judge.open_benchmark(
            self.tokenizer, grid.prompts_per_task, grid.samples, self.pool
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _loaded(self, weights: str) -> Backbone:
        backbone = load_backbone("llamagen", weights, device=self.device, dtype="float32")
        if backbone.image_size != (SIZE, SIZE):
            height, width = backbone.image_size
            raise UserError(
                f"{weights} draws images of {width} x {height} px, and the scenes have {SIZE} px: give "
                "a base of their size"
            )
        return backbone.requires_grad_(True)

    # -- a run -------------------------------------------------------------------------------------
    def do(self, run: LongRun, stream: torch.cuda.Stream | None) -> None:
        """Train a model on this stream and examine it. Its lines are written once judged."""
        started, config = time.time(), run.config(self.grid)
        images, held_out = self.grid.images, self.grid.held_out
        train, held = split_indices(images + held_out, held_out, run.seed)
        if not run.arm.trained:
            with self.eager, torch.cuda.stream(self.side):
                facts = {"seconds": round(time.time() - started, 1)}
                self._examine(run, run.arm.name, self._fresh(run).eval(), held, facts)
            return
        if run.arm.away:
            self._step_away(run, config, held, stream)
            return
        with self.eager, torch.cuda.stream(self.side):
            model = self._fresh(run)
            batches = order(self.scenes[run.base], config, train)
            trainer = self._new_trainer(model, run, config, batches, stream)
        trainer.run(trainer.steps)
        model = trainer.end()
        facts = _loss_course(trainer) | {"seconds": round(time.time() - started, 1)}
        with self.eager, torch.cuda.stream(self.side):
            if run.arm.name in (CONTROL, FALLING):
                torch.save(model.backbone.state_dict(), self._weights_path(run, run.arm.name))
            self._examine(run, run.arm.name, model, held, facts)

    def new_stream(self) -> torch.cuda.Stream | None:
        """A new stream on a GPU, None on a CPU."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _fresh(self, run: LongRun, method: TensorARConfig | None = None) -> TensorAR:
        """A copy of the base with a new codec, by default of the arm's method."""
        known = self.backbones[run.base]
        # The frozen parts are shared, not copied.
        backbone = copy.deepcopy(known, {id(known.frozen): known.frozen})
        return TensorAR(backbone, method or run.arm.method, seed=run.seed)

    def _new_trainer(
        self,
        model: TensorAR,
        run: LongRun,
        config: TrainConfig,
        batches: Order,
        stream: torch.cuda.Stream | None,
    ) -> Trainer:
        """A trainer; on a GPU it has already run its first steps, and recorded one."""
        loss = objective(run.arm.objective, model)
        trainer = Trainer(model, loss, config, batches, stream=stream if self.grid.record else None)
        if stream is not None and self.side is not None:
            self.side.synchronize()  # the trainer's stream reads what was made on it
            trainer.run(WARM_UP + 1)
            self.side.synchronize()
            stream.synchronize()
        return trainer

    def _examine(self, run: LongRun, name: str, model: TensorAR, held: Tensor, facts: dict) -> None:
        """Measure a model on held-out scenes, draw images in all ways, and have them judged."""
        grid, scenes, lines = self.grid, self.scenes[run.base], []
        about = {"key": run.key(grid), "base": run.base, "seed": run.seed, "steps": grid.steps}
        about |= {"weights": run.weights}
        about |= {"control": run.arm.control, "device": _device_name(self.device)}
        batches = held_out_batches(scenes, held)
        facts = facts | long_judge.held_out(model, batches)
        if model.config.k > 1 and (control := self._control(run)) is not None:
            facts["repairs"] = repairs(model, control, batches)
        keys = make_keys(run.seed, *self.benchmark.jobs)
        for way, options in {"": {}, **run.arm.ways}.items():
            line = about | {"arm": f"{name}, {way}" if way else name}
            line["settings"] = _settings(run, grid) | {"sampling": options}
            drawing = long_judge.draw(
                model, self.benchmark, scenes.prepared, keys, options, grid.draw_batch
            )
            line |= long_judge.likeness(drawing, self.benchmark, self.tokenizer)
            if drawing.geometry.stages > 1:
                changes = stage_changes(drawing.windows_nNkS.cpu(), drawing.geometry)
                line["changes"] = {name: v.mean(0).tolist() for name, v in changes.items()}
            answers = long_judge.ask_verdicts(drawing, self.benchmark, self.pool)
            lines.append((answers, line | ({} if way else facts)))
        self.unjudged.append(lines)
        self.write_down(wait=not self.grid.workers)  # without processes, waiting loses no time

    def write_down(self, wait: bool = False) -> None:
        """Write the lines whose verdicts are complete; callers hold `eager` while runs go on."""
        waiting, self.unjudged = self.unjudged, []
        for lines in waiting:
            if wait or all(answer.done() for answers, _ in lines for answer in answers):
                done = [line | long_judge.score(answers, self.benchmark) for answers, line in lines]
                append(self.grid.out, done, ("base", "arm", "seed", "score", "seconds"))
            else:
                self.unjudged.append(lines)

    def close(self) -> None:
        """Wait for all verdicts and write the remaining lines."""
        self.write_down(wait=True)
        self.pool.shutdown()

    # -- away from own samples ---------------------------------------------------------------------
    def _weights_path(self, run: LongRun, name: str) -> Path:
        """The file of the backbone that the arm `name` trained."""
        folder = self.grid.out / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        settings = json_sha256(self.grid.trained())[:8]
        return folder / f"{run.base}-{run.seed}-{name.replace(' ', '-')}-{settings}.pt"

    def _control(self, run: LongRun) -> TensorAR | None:
        """The run's trained control, or None if it has not been trained yet."""
        path = self._weights_path(run, run.arm.control)
        if not path.exists():
            return None
        model = self._fresh(run, presets.base())
        model.backbone.load_state_dict(torch.load(path, map_location=self.device))
        return model.eval()

    def _step_away(
        self, run: LongRun, config: TrainConfig, held: Tensor, stream: torch.cuda.Stream | None
    ) -> None:
        """Train the control on its own samples, and examine steps the opposite way (Neon)."""
        started = time.time()
        steps = min(AWAY_STEPS, self.grid.steps)
        config = replace(config, steps=steps, optim=replace(config.optim, backbone_falls=False))
        with self.eager, torch.cuda.stream(self.side):
            if (model := self._control(run)) is None:
                print(f"{run.arm.name}: skipped, train {run.arm.control} first", flush=True)
                return
            before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
            own = self._own_samples(model, run, steps * config.batch_size)
            batches = order(own, config, torch.arange(len(own.codes_nT)))
            trainer = self._new_trainer(model, run, config, batches, stream)
        trainer.run(trainer.steps)
        after = trainer.end().backbone.state_dict()
        facts = _loss_course(trainer) | {"seconds": round(time.time() - started, 1)}
        for weight in run.arm.away:
            with self.eager, torch.cuda.stream(self.side):
                away = self._fresh(run).eval()
                mixed = {n: value + weight * (value - after[n]) for n, value in before.items()}
                away.backbone.load_state_dict(mixed)
                self._examine(run, f"{run.arm.name}, {weight:g}", away, held, facts)

    @torch.no_grad()
    def _own_samples(self, model: TensorAR, run: LongRun, count: int) -> EncodedScenes:
        """Samples for captions of the training scenes, without filters or guidance."""
        scenes, codes = self.scenes[run.base], []
        count = min(count, AWAY_SAMPLES, len(scenes.captions_n))
        plain = replace(model.sampling, cfg_scale=1.0, top_p=1.0, top_k=0, temperature=1.0)
        captions = scenes.captions_n[:count]
        keys = make_keys(1000 + run.seed, torch.arange(count))
        for rows, part in zip(keys.split(1600), captions.split(1600), strict=True):
            given = {name: value[part] for name, value in scenes.prepared.items()}
            windows = sample_windows(model, given, rows, plain, speed="eager")
            codes.append(model.windows.final_codes(windows)[..., 0])
        return EncodedScenes(torch.cat(codes), captions, scenes.prepared)


def _loss_course(trainer: Trainer) -> dict:
    """Slot 0's training loss by tenths of the run, and whether all losses are finite."""
    parts = trainer.losses_Rk[:, 0].tensor_split(min(_COURSE_PARTS, trainer.steps))
    return {
        "course": [round(float(part.mean()), 4) for part in parts],
        "finite": bool(trainer.losses_Rk.isfinite().all()),
    }


def _settings(run: LongRun, grid: LongGrid) -> dict:
    """The settings that a result line reports."""
    arm = asdict(run.arm)
    judged = {"prompts": TASKS * grid.prompts_per_task, "samples": grid.samples}
    trained = {"images": grid.images, "batch_size": grid.batch_size, "precision": grid.precision}
    return {k: arm[k] for k in ("method", "falls", "optim", "objective")} | judged | trained


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

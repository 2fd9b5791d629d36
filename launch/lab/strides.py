"""Quality against calls: what drawing several codes per call does to images.

`ideal` trains nothing: it draws from the base as the best possible multi-token model would. Each
code of a window follows its exact distribution given everything before the window, independently of
the window's other codes. A stride without refinement would reach this with endless training.

`trained` attaches a codec to a base and trains both, for every window size and seed. `refined`
learns to read its own drafts. `multi-token` is trained on noise instead of drafts and draws none:
all slots that it draws are final. Each model then draws GenEval's prompts at every stride. The
control is the base, trained for as many steps.

Each result is a JSON line in OUT/results.jsonl; results that are there already are skipped.
docs/fewer_steps.md shows them.

python launch/lab/strides.py ideal --seeds 0                      # minutes on a processor
python launch/lab/strides.py trained --device cuda --workers 15 --scenes 100000 --steps 400 \\
    --batch 256
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.lab.long_arms import LongArm
from launch.lab.long_grid import LongGrid, LongRun
from launch.lab.result_lines import append, results, scores
from t2i import cli
from t2i.errors import UserError
from t2i.files import writable_folder
from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig

if TYPE_CHECKING:
    from torch import Tensor

    from launch.lab.long_data import EncodedScenes
    from t2i.sampling import SamplingConfig
    from t2i.tensorar.model import TensorAR

_HELD_OUT = 64
"""Scenes for the held-out loss."""


@dataclass(frozen=True)
class Strides:
    """What to train and how to score it."""

    part: tyro.conf.Positional[Literal["ideal", "trained"]]
    """Draw from the base as the best possible multi-token model would, or train codecs and draw."""
    base: str = "shapes"
    """Shipped base, or a folder with a base; `trained` needs a LlamaGen."""
    out: Path = Path("runs/strides")
    """Folder of results.jsonl."""
    sizes: tuple[int, ...] = (2, 4, 8)
    """Window sizes k."""
    strides: tuple[int, ...] = (1, 2, 4)
    """Codes that a call makes final; each model draws with the strides up to its k."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, also used for drawing."""
    steps: int = 300
    """Optimizer steps of each run."""
    batch: int = 32
    """Samples per step."""
    scenes: int = 10000
    """Scenes to train on; the base has not seen them."""
    codec_lr: float = 3e-3
    """Learning rate of the codec; it falls to zero, like the backbone's."""
    backbone_lr: float = 1e-4
    """Learning rate of the backbone."""
    prompts_per_task: int = 20
    """Benchmark prompts for each of GenEval's six tasks."""
    samples: int = 2
    """Images per benchmark prompt."""
    ahead: int = 8
    """Windows per call of the speculative drawing whose calls are counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 0
    """Processes that render scenes; 0: the main process renders them."""

    def of(self, names: Iterable[str]) -> dict:
        """The settings with these names."""
        return {name: getattr(self, name) for name in names}


JUDGED = ("base", "prompts_per_task", "samples")
"""Settings that every result depends on."""
TRAINED = ("ahead", "steps", "batch", "scenes", "codec_lr", "backbone_lr")
"""Further settings that results of `trained` depend on."""


def arms(study: Strides) -> Iterator[LongArm]:
    """What to train, and the strides and windows to draw it with."""

    def arm(name: str, method: TensorARConfig, ways: Iterable[tuple[int, int]]) -> LongArm:
        options = {str((s, w)): {"stride": s, "window": w} for s, w in ways}
        rates = {"codec_lr": study.codec_lr, "backbone_lr": study.backbone_lr}
        return LongArm(name, method, optim=rates, ways=options)

    yield arm("control", presets.base(), [(1, 0)])
    # Drafts become codes here, so they weigh as much as slot 0, but they do not train the trunk.
    shared = {"depth": 2, "mlp": True, "slot_weights": (1.0,), "detach": True}
    for k in study.sizes:
        method = presets.iclr2026(k=k, own_drafts=1.0, **shared)
        yield arm(f"refined k={k}", method, [(s, 0) for s in study.strides if s <= k])
    method = presets.iclr2026(k=max(study.strides), noise_floor=1.0, **shared)
    yield arm("multi-token", method, [(s, s) for s in study.strides if s > 1])


def draw_scenes(study: Strides, model: "TensorAR") -> "EncodedScenes":
    """The scenes to train on, followed by the held-out ones."""
    from launch.lab.long_data import drawn_scenes
    from t2i.sources import BackboneSource, expand_folder

    family = model.backbone.spec.family
    tokenizer = expand_folder(BackboneSource(family, study.base)).tokenizer
    if family != "llamagen" or tokenizer is None:
        raise UserError(
            f"base={study.base} must be a LlamaGen with its image tokenizer: `trained` trains no other"
        )
    count = study.scenes + _HELD_OUT
    return drawn_scenes(model.backbone, Path(tokenizer), count, study.out, study.workers)


def trained(study: Strides, arm: LongArm, seed: int, scenes: "EncodedScenes") -> "TensorAR":
    """The base with a new codec, both trained."""
    import torch

    from launch.lab.long_arms import objective
    from launch.lab.long_data import order
    from launch.lab.long_steps import Trainer
    from t2i.checkpoint import load_model
    from t2i.tensorar.model import TensorAR

    base = load_model(study.base, device=study.device, dtype="float32")
    model = TensorAR(base.backbone.requires_grad_(True), arm.method, seed=seed)
    grid = LongGrid("", steps=study.steps, batch_size=study.batch)
    config = LongRun("", study.base, arm, seed).config(grid)
    batches = order(scenes, config, torch.arange(study.scenes))
    trainer = Trainer(model, objective("method", model), config, batches)
    trainer.run(study.steps)
    return trainer.end()


def held_out_loss(model: "TensorAR", scenes: "EncodedScenes") -> list[float]:
    """Cross entropy of each slot on the held-out scenes, with the model's own drafts as input."""
    import torch

    from launch.lab.long_data import held_out_batches
    from t2i.training.validation import batch_losses

    count = len(scenes.codes_nT)
    (batch,) = held_out_batches(scenes, torch.arange(count - _HELD_OUT, count))
    with torch.no_grad():
        sums, counts = batch_losses(model, batch)[0][1]
    return [round(loss, 4) for loss in (sums / counts).tolist()]


def scored(study: Strides, model: "TensorAR", seed: int, sampling: "SamplingConfig") -> dict:
    """GenEval's score of the model's images, and calls per code with and without speculation."""
    from launch.lab.fewer_steps import courses
    from t2i.shapes.fine_tuning import examine
    from t2i.shapes.shapes_prompts import benchmark_prompts
    from t2i.tensorar.sampler import drawn_windows

    metadata = benchmark_prompts(0, study.prompts_per_task)
    report = examine(
        model,
        metadata,
        seed=seed,
        samples=study.samples,
        sampling=sampling,
        batch_size=48 if model.backbone.device.type == "cpu" else 480,
    ).report
    geometry = drawn_windows(model, sampling)
    calls = [len(own) for own in courses(model, sampling, study.ahead)[1]]
    return scores([v.correct for v in report.verdicts], metadata, study.samples) | {
        "calls_per_code": geometry.count / geometry.tokens,
        "speculating": study.ahead,
        "speculating_calls_per_code": sum(calls) / len(calls) / geometry.tokens,
    }


# -- the best possible multi-token model -----------------------------------------------------------


def drawn_apart(
    model: "TensorAR", prepared: "dict[str, Tensor]", keys: "Tensor", stride: int
) -> "Tensor":
    """Codes [B, T, S] drawn from a base, the codes of a window independently of each other.

    Before code j of a window, the j codes before it are drawn separately, with other noise, and
    then discarded. So it follows its distribution given everything before the window.
    """
    import torch

    from t2i.rng import fold
    from t2i.tensorar.drawing import noise_keys
    from t2i.tensorar.sampler import (
        advance,
        draw_windows,
        encode_rows,
        guidance_table,
        new_drawing,
        new_state,
        run_prefix,
    )

    scales, windows = guidance_table(model, model.sampling), model.windows
    with torch.no_grad():
        condition = encode_rows(model.backbone, prepared, guided=scales is not None)
        state = new_state(model, condition, scales, windows, own_pace=True)
        noise = noise_keys(keys, windows, len(model.backbone.spec.subvocabs))
        drawing = new_drawing(model, state, keys, noise, model.sampling)
        h, drawn = run_prefix(model.backbone, state)[:, None], drawing.windows_BNkS

        def draw(h_R1D: "Tensor", position: int, own: "Tensor") -> "Tensor":
            index = torch.tensor([position], device=keys.device)
            return draw_windows(model, h_R1D, index, replace(drawing, noise_NBkS=own))

        def feed(codes: "Tensor", position: int) -> "Tensor":
            index = torch.arange(position, position + codes.shape[1], device=keys.device)
            return advance(model, codes, index, state, state.extent(int(index[-1])))[:, -1:]

        for start in range(0, windows.tokens, stride):
            slots = range(start, min(start + stride, windows.tokens))
            for slot in slots:
                apart = h
                for before in range(start, slot):
                    apart = feed(draw(apart, before, fold(noise, 9000 + slot - start)), before)
                drawn[:, slot : slot + 1] = draw(apart, slot, noise)
            h = feed(drawn[:, start : slots[-1] + 1], start)
    return drawn[:, :, 0]


def study_ideal(study: Strides, model: "TensorAR", done: set[str]) -> Iterator[dict]:
    """A line for every seed and stride that is not `done`."""
    import torch

    import geneval
    from t2i.generation import all_jobs, to_images
    from t2i.rng import make_keys
    from t2i.shapes.shapes_detector import ShapesDetector
    from t2i.shapes.shapes_prompts import benchmark_prompts

    metadata = benchmark_prompts(0, study.prompts_per_task)
    prompts = [entry["prompt"] for entry in metadata]
    prepared = model.backbone.prepare(prompts, model.backbone.prefix_length(prompts))
    jobs = torch.tensor(all_jobs(range(len(prompts)), study.samples))
    for seed in study.seeds:
        for stride in study.strides:
            about = {"arm": "ideal", "stride": stride, "seed": seed, "settings": study.of(JUDGED)}
            if (key := json.dumps(about)) in done:
                continue
            images, start = [], time.perf_counter()
            for rows in jobs.split(48):
                own = {name: value[rows[:, 0]] for name, value in prepared.items()}
                keys = make_keys(seed, *rows.T).to(model.backbone.device)
                images += to_images(model, drawn_apart(model, own, keys, stride))
            verdicts = geneval.score(images, metadata, ShapesDetector()).verdicts
            line = scores([v.correct for v in verdicts], metadata, study.samples)
            calls = -(-model.windows.tokens // stride) / model.windows.tokens
            taken = {"seconds_drawing": time.perf_counter() - start}
            yield {"key": key, **about, **line, "calls_per_code": calls} | taken


# -- trained codecs --------------------------------------------------------------------------------


def arm_lines(
    study: Strides, arm: LongArm, seed: int, scenes: "EncodedScenes", done: set[str]
) -> Iterator[dict]:
    """A line for every way of drawing the arm that is not `done`."""
    settings = study.of((*JUDGED, *TRAINED))
    about = {"arm": arm.name, "k": arm.method.k, "seed": seed, "settings": settings}
    keys = {way: json.dumps(about | {"way": way}) for way in arm.ways}
    todo = {way: key for way, key in keys.items() if key not in done}
    if not todo:
        return
    start = time.perf_counter()
    model = trained(study, arm, seed, scenes)
    about |= {"losses": held_out_loss(model, scenes), "seconds": time.perf_counter() - start}
    for way, key in todo.items():
        start, options = time.perf_counter(), arm.ways[way]
        sampling = replace(model.sampling, **options)
        line = {"key": key, **about, **options}
        line |= scored(study, model, seed, sampling)
        yield line | {"seconds_drawing": time.perf_counter() - start}


def study_trained(study: Strides, model: "TensorAR", done: set[str]) -> Iterator[dict]:
    scenes = draw_scenes(study, model)
    for seed in study.seeds:
        for arm in arms(study):
            yield from arm_lines(study, arm, seed, scenes, done)


def main() -> None:
    study = cli.parse(Strides, __doc__)
    import torch

    from t2i.checkpoint import load_model

    writable_folder(study.out)
    done = {line["key"] for line in results(study.out)}
    model = load_model(study.base, device=study.device, dtype="float32")
    name = "cpu" if model.backbone.device.type == "cpu" else torch.cuda.get_device_name()
    machine = {"torch": torch.__version__, "device": name, "study": asdict(study)}
    lines = {"ideal": study_ideal, "trained": study_trained}[study.part](study, model, done)
    shown = ("arm", "stride", "seed", "score", "tags", "losses", "speculating_calls_per_code")
    for line in lines:
        append(study.out, [line | machine], shown)


if __name__ == "__main__":
    cli.run(main)

"""Quality against calls: strides with refinement and without, beside the base and its speculation.

For every window size and seed a codec is attached to a shipped base and trained with it: `refined`
learns to read its own drafts. `multi-token` sees noise in their place and is drawn without any: no
more slots than are final. Each model then draws GenEval's prompts at every stride. The control is
the base, trained as long. A JSON line for each result; what is in OUT/results.jsonl is not done
again.
docs/fewer_steps.md shows the results.

python launch/lab/strides.py --seeds 0 --sizes 4 --steps 200      # some minutes on a processor
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.files import read_json_lines, writable_folder
from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig

if TYPE_CHECKING:
    from torch import Tensor

    from t2i.sampling import SamplingConfig
    from t2i.tensorar.model import TensorAR

_HELD_OUT, _DROPPED = 64, 0.1


@dataclass(frozen=True)
class Strides:
    """What to train, and how it is examined."""

    base: str = "shapes"
    """Shipped base, or a folder of one."""
    out: Path = Path("runs/strides")
    """Folder of results.jsonl."""
    sizes: tuple[int, ...] = (2, 4, 8)
    """Window sizes k."""
    strides: tuple[int, ...] = (1, 2, 4)
    """Those up to k are drawn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training; they seed the images as well."""
    steps: int = 300
    """Optimizer steps of each run."""
    batch: int = 32
    scenes: int = 10000
    """Scenes to learn from, of a world that the base has not seen."""
    codec_lr: float = 3e-3
    """Falls to zero, as the backbone's does."""
    backbone_lr: float = 1e-4
    prompts_per_task: int = 20
    """Benchmark prompts for each of GenEval's six tasks."""
    samples: int = 2
    """Images per benchmark prompt."""
    ahead: int = 8
    """Windows a call of the speculation whose calls are counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 0
    """Processes that draw scenes; 0 draws them in this one."""


@dataclass(frozen=True)
class Arm:
    """A model that is trained, and the (stride, window) that it is drawn with."""

    name: str
    method: TensorARConfig
    ways: tuple[tuple[int, int], ...]


def arms(study: Strides) -> Iterator[Arm]:
    yield Arm("control", presets.base(), ((1, 0),))
    # Drafts become codes here, so they weigh as much as slot 0; the trunk is kept from their pull.
    shared = {"depth": 2, "mlp": True, "slot_weights": (1.0,), "detach": True}
    for k in study.sizes:
        method = presets.iclr2026(k=k, own_drafts=1.0, **shared)
        yield Arm(f"refined k={k}", method, tuple((s, 0) for s in study.strides if s <= k))
    method = presets.iclr2026(k=max(study.strides), noise_floor=1.0, **shared)
    yield Arm("multi-token", method, tuple((s, s) for s in study.strides if s > 1))


@dataclass(frozen=True)
class Scenes:
    """Codes int64 [scenes, T, 1], the number of each one's caption, and all captions prepared."""

    codes: "Tensor"
    captions: "Tensor"
    prepared: "dict[str, Tensor]"


def draw_scenes(study: Strides, model: "TensorAR") -> Scenes:
    import torch

    from t2i.shapes.caption_bases import drawn_scenes, every_caption, to_pixels
    from t2i.shapes.tiny_recipes import CaptionBase

    backbone, captions = model.backbone, every_caption()
    world = CaptionBase(
        study.out,
        seed=1,
        image_size=backbone.image_size[0],
        scenes=study.scenes + _HELD_OUT,
        workers=study.workers,
    )
    numbers, codes, drawn = {text: i for i, text in enumerate(captions)}, [], []
    for images, texts in drawn_scenes(world, 256):
        codes.append(backbone.encode_images(to_pixels(images, backbone.device)))
        drawn += [numbers[text] for text in texts]
    device = backbone.device
    return Scenes(torch.cat(codes), torch.tensor(drawn, device=device), backbone.prepare(captions))


def trained(study: Strides, arm: Arm, seed: int, scenes: Scenes) -> "TensorAR":
    """The base with a fresh codec, after its run."""
    import torch

    from t2i.checkpoint import load_model
    from t2i.rng import make_keys
    from t2i.tensorar.model import TensorAR

    base = load_model(study.base, device=study.device, dtype="float32")
    model = TensorAR(base.backbone, arm.method, seed=seed).train()
    device, own = base.backbone.device, [] if model.codec is None else [*model.codec.parameters()]
    rest = [p for part in base.backbone.trained_modules() for p in part.parameters()]
    rates = [study.backbone_lr, study.codec_lr]
    groups = [{"params": rest}, {"params": own}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)
    random = torch.Generator().manual_seed(seed)
    for step in range(study.steps):
        rows = torch.randint(study.scenes, (study.batch,), generator=random)
        drop = (torch.rand(study.batch, generator=random) < _DROPPED).to(device)
        keys = make_keys(seed, torch.arange(study.batch), step).to(device)
        rows, done = rows.to(device), step / study.steps
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            codes, condition = scenes.codes[rows], condition_of(model, scenes, rows, drop)
            windows = model.training_windows(codes, condition, keys, done)
            loss = model(codes, condition, windows).loss
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - done)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*rest, *own], 1.0)
        optimizer.step()
    return model.eval()


def condition_of(model: "TensorAR", scenes: Scenes, rows: "Tensor", drop: "Tensor | None" = None):
    captions = scenes.captions[rows]
    prepared = {name: value[captions] for name, value in scenes.prepared.items()}
    return model.backbone.encode_condition(prepared, drop)


def held_out_loss(model: "TensorAR", scenes: Scenes) -> list[float]:
    """Cross entropy by slot of scenes that were not learnt from, with own drafts as input."""
    import torch

    from t2i.rng import make_keys

    rows = torch.arange(len(scenes.codes) - _HELD_OUT, len(scenes.codes))
    keys = make_keys(0, torch.arange(_HELD_OUT)).to(scenes.codes.device)
    with torch.no_grad():
        codes, condition = scenes.codes[rows], condition_of(model, scenes, rows)
        windows = model.own_draft_windows(codes, condition, keys)
        return [round(loss, 4) for loss in model(codes, condition, windows).means().tolist()]


def scored(study: Strides, model: "TensorAR", seed: int, sampling: "SamplingConfig") -> dict:
    """GenEval's score of images, and the calls that they need."""
    from launch.lab.fewer_steps import courses
    from t2i.shapes.fine_tuning import examine
    from t2i.shapes.shapes_prompts import benchmark_prompts
    from t2i.tensorar.sampler import drawn_windows

    report = examine(
        model,
        benchmark_prompts(0, study.prompts_per_task),
        seed=seed,
        samples=study.samples,
        sampling=sampling,
        batch_size=48 if model.backbone.device.type == "cpu" else 480,
    ).report
    geometry = drawn_windows(model, sampling)
    verdicts, each = [int(v.correct) for v in report.verdicts], study.samples
    calls = [len(own) for own in courses(model, sampling, study.ahead)[1]]
    return {
        "score": report.summary.overall,
        "tags": {tag: one.mean for tag, one in report.summary.tags.items()},
        "correct": [sum(verdicts[i : i + each]) for i in range(0, len(verdicts), each)],
        "calls_per_code": geometry.count / geometry.tokens,
        "speculating": study.ahead,
        "speculating_calls_per_code": sum(calls) / len(calls) / geometry.tokens,
    }


def do(study: Strides, arm: Arm, seed: int, scenes: Scenes, done: set[str]) -> Iterator[dict]:
    """A line for every way of drawing that has none."""
    settings = f"{study.base} steps={study.steps} batch={study.batch} scenes={study.scenes}"
    about = {"arm": arm.name, "k": arm.method.k, "seed": seed, "settings": settings}
    keys = {way: f"{settings} {arm.name} seed={seed} {way}" for way in arm.ways}
    todo = {way: key for way, key in keys.items() if key not in done}
    if not todo:
        return
    start = time.perf_counter()
    model = trained(study, arm, seed, scenes)
    about |= {"losses": held_out_loss(model, scenes), "seconds": time.perf_counter() - start}
    for (stride, window), key in todo.items():
        start = time.perf_counter()
        sampling = replace(model.sampling, stride=stride, window=window)
        line = {"key": key, **about, "stride": stride, "window": window}
        line |= scored(study, model, seed, sampling)
        yield line | {"seconds_drawing": time.perf_counter() - start}


def main() -> None:
    study = cli.parse(Strides, __doc__)
    import torch

    from t2i.checkpoint import load_model

    path = writable_folder(study.out) / "results.jsonl"
    done = {line["key"] for line in read_json_lines(path)} if path.exists() else set()
    model = load_model(study.base, device=study.device, dtype="float32")
    scenes = draw_scenes(study, model)
    name = "cpu" if model.backbone.device.type == "cpu" else torch.cuda.get_device_name()
    machine = {"torch": torch.__version__, "device": name, "study": asdict(study)}
    for seed in study.seeds:
        for arm in arms(study):
            for line in do(study, arm, seed, scenes, done):
                with open(path, "a") as file:
                    file.write(json.dumps(line | machine, default=str) + "\n")
                shown = ("arm", "stride", "seed", "score", "losses", "speculating_calls_per_code")
                print({name: line[name] for name in shown}, flush=True)


if __name__ == "__main__":
    cli.run(main)

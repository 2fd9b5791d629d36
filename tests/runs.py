"""Tiny training runs, and comparisons of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import Killed, randomize
from safetensors.torch import load_file

import t2i
from launch.lab.soak_models import write_janus, write_llamagen
from t2i.imaging import save_png
from t2i.reward.reward_options import RewardConfig, RewardOptions
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.logs import read_metrics
from t2i.training.training_run import Run

PROMPTS = ["a photo of a red circle", "a photo of two squares"]
SAME_SUM = 1e-5
"""Relative tolerance between sums of the same numbers in different orders."""


def write_tiny_base(folder: Path) -> Path:
    """Write a backbone folder for `--backbone.weights`."""
    return write_llamagen(folder, randomize, sampling={"cfg_scale": 2.0})


def write_tiny_janus(folder: Path) -> Path:
    """Write a Janus folder in transformers' layout, for images of the tiny base's size."""
    return write_janus(folder, randomize)


def tiny_janus_run(root: Path, name: str, **changes) -> TrainConfig:
    """`tiny_run` with the Janus model under `root`."""
    janus = {"backbone__family": "janus", "backbone__weights": str(root / "janus")}
    return tiny_run(root, name, **(janus | changes))


def tiny_run(root: Path, name: str, **changes) -> TrainConfig:
    """The settings of a run on the LlamaGen model and data under `root` (see the `tiny_world`
    fixture): 16 samples per step, k = 3.

    `changes` names nested options by their path, such as `engine__zero_stage=2`.
    """
    config = TrainConfig(
        run_dir=root / "runs" / name,
        backbone=BackboneOptions(weights=str(root / "base")),
        method=TensorARConfig(k=3),
        data=DataOptions(source=str(root / "data"), cache_dir=root / "cache", validation_samples=9),
        optim=OptimOptions(codec_lr=1e-2, backbone_lr=1e-3),
        engine=EngineOptions(micro_batch=4),
        log=LogOptions(log_every=1, validate_every=0, sample_every=0, save_every=0),
        batch_size=16,
        steps=3,
        token_dropout=0.0,
    )
    parts: dict[str, dict] = {}
    for path, value in changes.items():
        part, _, option = path.rpartition("__")
        parts.setdefault(part, {})[option] = value
    own = parts.pop("", {})
    nested = {part: replace(getattr(config, part), **options) for part, options in parts.items()}
    return replace(config, **nested, **own)


def tiny_reward_run(root: Path, name: str, **changes) -> RewardConfig:
    """`tiny_run` as reward fine-tuning for brightness: four groups of four images per step."""
    reward = RewardOptions(functions=("reward_functions:brightness",), group=4, watch=())
    given = {k.removeprefix("reward__"): v for k, v in changes.items() if k.startswith("reward__")}
    config = tiny_run(
        root, name, **{k: v for k, v in changes.items() if k.split("__")[0] != "reward"}
    )
    own = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    return RewardConfig(**own, reward=replace(reward, **given))


def plain_options(root: Path, name: str) -> list[str]:
    """Options of train_llamagen.py for the same run as the `plain` fixture's."""
    text = f"""shapes-iclr2026 --backbone.weights {root / "base"} --method.k 3
        --data.source {root / "data"} --data.cache-dir {root / "cache"} --data.validation-samples 9
        --optim.codec-lr 1e-2 --optim.backbone-lr 1e-3 --optim.warmup-steps 0 --engine.micro-batch 4
        --log.log-every 1 --log.validate-every 0 --log.sample-every 0 --log.save-every 0
        --batch-size 16 --steps 3 --run-dir {root / "runs" / name}"""
    return text.split()


@contextmanager
def before_step(number: int, act: Callable[[Run], object]) -> Iterator[None]:
    """Within this context, call `act(run)` before a run's step that follows `number` steps."""
    step = Run.train_step

    def act_and_step(run: Run) -> dict[str, float]:
        if run.step == number:
            act(run)
        return step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", act_and_step)
        yield


def kill(run: Run) -> None:
    """An action for `before_step`."""
    raise Killed


def saved_after_two_steps(run: Run) -> tuple[Path, TensorAR]:
    """Take two steps and save; return the checkpoint folder and its model, reloaded. Asserts that
    the model has exactly the run's weights.
    """
    run.model.train()
    run.train_step()
    run.train_step()
    folder = run.save()
    reloaded = t2i.from_pretrained(folder)
    assert_same_weights(run.model.state_dict(), reloaded.state_dict())
    return folder, reloaded


def metrics(root: Path, name: str) -> list[dict]:
    """A run's metrics, without those that depend on the machine or the ZeRO stage."""
    skipped = ("images_per_s", "data_wait", "memory_gb", "train/grad_norm", "seconds/")
    rows = read_metrics(root / "runs" / name)
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in rows]


def assert_same_metrics(a: list[dict], b: list[dict], tolerance: float) -> None:
    assert [sorted(row) for row in a] == [sorted(row) for row in b]
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a == pytest.approx(row_b, rel=tolerance, abs=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a checkpoint folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return {f"{file.name}:{k}": v for file in files for k, v in load_file(file).items()}


def state_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The weights or a moment (`kind`) of every parameter in a checkpoint's training state."""
    files = map(load_file, sorted((folder / "training_state").glob("*.safetensors")))
    found = {key: value for file in files for key, value in file.items()}
    return {k.removesuffix(f"/{kind}"): v for k, v in found.items() if k.endswith(f"/{kind}")}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def draw(folder: Path, out: Path) -> list[bytes]:
    """The bytes of PNG files of a few images drawn by a checkpoint."""
    images = t2i.generate(t2i.from_pretrained(folder), PROMPTS, batch_size=2, progress=False)
    return [save_png(image, out / f"{i}.png").read_bytes() for i, image in enumerate(images)]

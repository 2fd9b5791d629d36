"""The small world of `soak.py`: a tiny base, images, runs on them, and comparisons of runs."""

import json
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch.lab.soak_models import MODELS, SoakModel
from t2i.checkpoint_folders import run_checkpoints
from t2i.files import file_sha256, read_json
from t2i.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 40, 5


class Skipped(Exception):
    """The case cannot run on this machine or as this user."""


@dataclass(frozen=True)
class World:
    """A folder with base/, data/, cache/ and runs/."""

    folder: Path
    model: SoakModel
    seed: int
    patience: float
    """Seconds after which a run that should end counts as hanging."""

    @property
    def most(self) -> float:
        """Seconds after which any run counts as hanging."""
        return 5 * self.patience

    @property
    def program(self) -> Path:
        """The program that trains the model."""
        return ROOT / "launch" / self.model.program

    def moments(self, case: str) -> random.Random:
        """Generator of a case's random moments."""
        return random.Random(f"{self.seed} {case}")

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def log(self, name: str) -> Path:
        """File for a run's output."""
        path = self.folder / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def words(self, name: str, **options: object) -> list[str]:
        """The arguments of a run's command line. In `options`, `data_source=` means --data.source,
        and `log_keep_best=False` means --log.no-keep-best.
        """
        own: dict[str, object] = {
            "backbone_weights": self.folder / "base",
            "method_k": 3,
            "data_source": self.folder / "data",
            "data_cache_dir": self.folder / "cache",
            "data_validation_samples": 9,
            "optim_codec_lr": 1e-2,
            "optim_backbone_lr": 1e-3,
            "engine_micro_batch": 4,
            "engine_zero_stage": 1,
            "batch_size": 8,
            "token_dropout": 0.1,
            "ema": 0.9,
            "steps": STEPS,
            "log_log_every": 1,
            "log_validate_every": 10,
            "log_sample_every": 0,
            "log_save_every": SAVE_EVERY,
            "log_tracker": "none",
            "run_dir": self.run_dir(name),
        }
        parts = ("backbone", "method", "data", "optim", "engine", "log")
        found = [self.model.recipe]
        for key, value in (own | options).items():
            part, _, rest = key.partition("_")
            no = "no-" if value is False else ""
            option = f"{part}.{no}{rest}" if part in parts else no + key
            found += [f"--{option.replace('_', '-')}", *([] if no else [str(value)])]
        return found


@dataclass
class Outcome:
    """The result of a case."""

    seen: str
    """How the run ended: a line of its output, or a description."""
    held: bool
    """Whether every promise was kept."""
    seconds: float | None = None
    """From the fault to the end of all processes."""
    same: bool | None = None
    """Whether the finished run equals an undisturbed one bit for bit; None: nothing to compare."""
    facts: dict = field(default_factory=dict)
    """Further numbers for results.jsonl."""


def build_world(folder: Path, family: str, seed: int, patience: float) -> World:
    """Write the base and the data that the folder lacks."""
    model = MODELS[family]
    if not (folder / "base" / "config.json").exists():
        model.write_base(folder / "base")
    if not (folder / "data").exists():
        model.write_data(folder / "data")
    return World(folder, model, seed, patience)


def fresh(world: World, name: str) -> Path:
    """A run's folder, removed if it exists."""
    run_dir = world.run_dir(name)
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_dir


# -- comparing -------------------------------------------------------------------------------------
def newest_step(run_dir: Path) -> int:
    found = run_checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def fingerprint(run_dir: Path) -> dict[str, str]:
    """Hashes of all files of the newest checkpoint and the best model, and all metrics but measured
    ones.
    """
    found = {}
    for folder in (run_checkpoints(run_dir)[-1], run_dir / "best"):
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            if name != "config.json":  # names the run folder
                found[f"{folder.name}/{name}"] = entry["sha256"]
                assert file_sha256(folder / name) == entry["sha256"], f"{folder / name} is damaged"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for measured in ("images_per_s", "data_wait", "memory_gb"):
            row.pop(measured, None)
    return found | {"metrics": json.dumps(rows)}


@contextmanager
def small_disk(world: World, size: int) -> Iterator[Callable[[int], object]]:
    """Mount a file system of `size` bytes at `world.folder`/disk; yields a function to resize it.

    Raises:
        Skipped: this user cannot mount file systems.
    """
    place = world.folder / "disk"
    place.mkdir(exist_ok=True)

    def mount(options: str, *, check: bool = True) -> int:
        words = shlex.split(f"mount -t tmpfs -o {options} tmpfs {place}")
        return subprocess.run(words, capture_output=True, check=check).returncode

    if mount(f"size={size}", check=False):
        raise Skipped("mounting a small file system needs root")
    try:
        yield lambda more: mount(f"remount,size={more}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)

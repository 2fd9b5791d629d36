"""Run a grid of fine-tunings on the shapes world, several at once on one GPU, and write a JSON line
for each result.

Data, loss, batch order and optimizer are those of the kit's own training loop, but a step is one
recorded CUDA graph (`long_steps.py`), so 3,000 steps of a small model take seconds. Runs whose
results are in OUT/results.jsonl are skipped.

    python launch/lab/long_grid.py long --bases 1m=runs/bases/1m 7m=runs/bases/7m --minutes 5
    python launch/lab/long_grid.py levers --bases 1m=runs/bases/1m --steps 100 --images 3000
    python launch/lab/long_report.py                 # tables and plot

It also runs on a CPU, but slowly.
"""

import math
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tyro.conf import Positional

from launch.lab.long_arms import LONG_GRIDS, LongArm
from launch.lab.result_lines import results
from t2i import cli
from t2i.errors import UserError, choose_one
from t2i.files import json_sha256, writable_folder
from t2i.models.llamagen.llamagen_recipes import text_recipes
from t2i.sampling import check_counts, check_seed
from t2i.training.config import TrainConfig

_MOST_WORKERS = 256


@dataclass(frozen=True)
class LongGrid:
    """Which runs, and how they are examined."""

    grid: Positional[str]
    """Name of a grid in launch/lab/long_arms.py."""
    out: Path = Path("runs/long")
    """Folder for results.jsonl, the scenes' codes and the weights of controls."""
    bases: tuple[str, ...] = ("7m=shapes",)
    """Base models to start from, each as name=folder; all must have the same image tokenizer."""
    arms: tuple[str, ...] = ()
    """Arms of the grid to run; default: all of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, also used for sampling."""
    steps: int = 3000
    """Optimizer steps of each run."""
    batch_size: int = 32
    """Samples per step."""
    images: int = 48_000
    """Scenes to train on."""
    held_out: int = 1024
    """Further scenes for the held-out losses."""
    prompts_per_task: int = 20
    """Benchmark prompts for each of GenEval's six tasks."""
    samples: int = 8
    """Images per benchmark prompt."""
    draw_batch: int = 960
    """Images drawn at once."""
    precision: Literal["fp32", "autocast"] = "autocast"
    """Precision of training; autocast computes in bf16."""
    at_once: int = 4
    """Runs that share the GPU at the same time; on a CPU always one."""
    workers: int = 2
    """Processes that draw scenes and judge images; 0: do both in this process."""
    minutes: float = math.inf
    """Start no further run after this many minutes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    record: bool = True
    """Record steps as CUDA graphs (on a GPU)."""

    def __post_init__(self):
        names = ("steps", "batch_size", "images", "held_out", "prompts_per_task", "samples")
        check_counts(**{n: getattr(self, n) for n in (*names, "draw_batch", "at_once")})
        for seed in self.seeds:
            check_seed(seed)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds={self.seeds}: give at least one seed, and none of them twice")
        for name in ("workers", "minutes"):
            if (given := getattr(self, name)) < 0:
                raise UserError(f"{name}={given} must not be negative")
        if self.workers > _MOST_WORKERS:
            raise UserError(
                f"workers={self.workers} must be at most {_MOST_WORKERS}: each is a process"
            )

    def trained(self) -> list:
        """The settings that a trained model depends on, besides base, arm and seed."""
        return [self.steps, self.batch_size, self.images, self.held_out, self.precision]


@dataclass(frozen=True)
class LongRun:
    """One fine-tuning of the grid."""

    base: str
    weights: str
    arm: LongArm
    seed: int

    def config(self, grid: LongGrid) -> TrainConfig:
        """The run's settings for the kit's own training loop."""
        recipe = text_recipes()["shapes-control"][1]
        optim = replace(recipe.optim, backbone_falls=self.arm.falls, **self.arm.optim)
        return replace(
            recipe,
            backbone=replace(recipe.backbone, weights=self.weights),
            method=self.arm.method,
            optim=optim,
            engine=replace(recipe.engine, precision=grid.precision, micro_batch=grid.batch_size),
            batch_size=grid.batch_size,
            steps=grid.steps,
            seed=self.seed,
        )

    def key(self, grid: LongGrid) -> str:
        """Identifies the result by everything that it depends on."""
        arm = asdict(replace(self.arm, control=""))
        # Newer fields are left out at their defaults, so that older results keep their keys.
        arm = {k: v for k, v in arm.items() if (k, v) not in (("trained", True), ("ways", {}))}
        given = [arm, *grid.trained(), grid.prompts_per_task, grid.samples]
        return f"{self.base}/{self.arm.name}/{self.seed}/{json_sha256(given)[:8]}"


def main() -> None:
    do_what_is_left(cli.parse(LongGrid, __doc__))


def do_what_is_left(grid: LongGrid) -> None:
    """Do the runs that have no result yet."""
    runs = planned(grid)
    writable_folder(grid.out, make=False)
    done = {line.get("key"): line.get("weights") for line in results(grid.out)}
    for run in runs:  # keys have the base's name only; older lines do not record its folder
        if (there := done.get(run.key(grid))) not in (None, run.weights):
            raise UserError(
                f"{grid.out} holds results of {there}, and {run.base} is {run.weights} now: give "
                "another --out"
            )
    todo = [run for run in runs if run.key(grid) not in done]
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)
    if todo:
        do(todo, grid)


def planned(grid: LongGrid) -> list[LongRun]:
    """All runs of the grid, the most informative first.

    Raises:
        UserError: there is no such grid or arm, or a base is not name=folder.
    """
    from t2i.sources import lasting

    if grid.grid not in LONG_GRIDS:
        raise UserError(f"unknown grid {grid.grid!r}; {choose_one(grid.grid, LONG_GRIDS)}")
    stages = LONG_GRIDS[grid.grid]
    known = [arm.name for stage in stages for arm in stage]
    for name in grid.arms:
        if name not in known:
            raise UserError(f"grid {grid.grid} has no arm {name}; {choose_one(name, known)}")
    bases = [base.partition("=") for base in grid.bases]
    if not all(weights for _, _, weights in bases):
        raise UserError(f"bases={grid.bases}: write each as name=folder")
    if len({name for name, _, _ in bases}) < len(bases):
        raise UserError(f"bases={grid.bases}: two have the same name")
    folders = {name: lasting(weights) for name, _, weights in bases}
    return [
        LongRun(base, folder, arm, seed)
        for stage in stages
        for seed in grid.seeds
        for arm in stage
        if not grid.arms or arm.name in grid.arms
        for base, folder in folders.items()
    ]


def do(runs: list[LongRun], grid: LongGrid) -> None:
    """Do the runs, several at once, until time is up; UserError at the end if some failed."""
    from launch.lab.long_world import GridWorld

    end = time.time() + 60 * grid.minutes
    world = GridWorld(grid)
    queue, lock = list(runs), threading.Lock()
    failed: list[str] = []

    def work() -> None:
        stream = world.new_stream()
        while True:
            with lock:
                if not queue or time.time() > end:
                    return
                run = queue.pop(0)
            try:
                world.do(run, stream)
            except Exception:  # the other runs go on
                failed.append(f"{run.base}, {run.arm.name}, seed {run.seed}")
                print(f"FAILED: {failed[-1]}", flush=True)
                traceback.print_exc()

    count = grid.at_once if world.device.type == "cuda" else 1
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.close()
    if queue:
        print(f"time is up: {len(queue)} runs were not started", flush=True)
    if failed:
        raise UserError(f"{len(failed)} runs failed (errors above): {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)

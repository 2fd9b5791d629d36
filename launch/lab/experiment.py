"""Run a declared grid of fine-tunings on the shapes world; a JSON line for each result.

A grid (`experiment_grids.py`) names arms: settings of the method, of the optimizer and of sampling.
Every arm starts from the same base in the same data order as the control, which is an arm as well.
What is in results.jsonl is not done again; a run that was stopped goes on from its last checkpoint;
several processes may work on one grid with --share.

    python launch/lab/experiment.py levers --bases 1m=runs/shapes-1m 3m=shapes
    python launch/lab/experiment.py levers --share 0/2 &
    python launch/lab/experiment.py levers --share 1/2
    python launch/lab/recipe_report.py        # tables and plots
"""

import fcntl
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tyro.conf import Positional

from launch.lab.experiment_grids import CONTROL, GRIDS, Arm
from t2i import cli
from t2i.errors import UserError
from t2i.files import json_sha256, read_json_lines, writable_folder
from t2i.models.llamagen.llamagen_recipes import text_recipes
from t2i.tensorar.method import TensorARConfig
from t2i.training.config import DataOptions, TrainConfig


@dataclass(frozen=True)
class Experiment:
    """Which runs, and how they are examined."""

    grid: Positional[str]
    """Name of a grid in launch/lab/experiment_grids.py."""
    out: Path = Path("runs/experiments")
    """Runs, caches and results.jsonl."""
    bases: tuple[str, ...] = ("3m=shapes",)
    """Base models to start from, name=folder."""
    arms: tuple[str, ...] = ()
    """Only these arms of the grid."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; they seed the sampling as well."""
    steps: int = 300
    """Optimizer steps of each run."""
    images: int = 3000
    """Size of the data set."""
    prompts_per_task: int = 20
    """Benchmark prompts for each of GenEval's six tasks."""
    samples: int = 4
    """Images per benchmark prompt."""
    precision: Literal["fp32", "autocast"] = "fp32"
    """Of training; autocast is twice as fast on processors that multiply in bf16."""
    share: str = "0/1"
    """Do every n-th run: i/n."""


@dataclass(frozen=True)
class GridRun:
    """One fine-tuning of the grid."""

    base: str
    weights: str
    arm: Arm
    seed: int

    def config(self, experiment: Experiment, arm: Arm | None = None) -> TrainConfig:
        """The training run, in a folder of its own."""
        arm, steps = arm or self.arm, experiment.steps
        recipe = text_recipes()["shapes-control"][1]
        assert isinstance(recipe.data, DataOptions), "a recipe for captions"
        # Rounded up, so that of an odd number, too, nothing is saved between half and the end.
        half = -(-steps // 2)
        config = replace(
            recipe,
            backbone=replace(recipe.backbone, weights=self.weights),
            method=arm.method,
            data=replace(
                recipe.data,
                source=f"shapes:{experiment.images}",
                cache_dir=experiment.out / "cache",
            ),
            optim=replace(recipe.optim, **arm.optim),
            engine=replace(recipe.engine, precision=experiment.precision),
            log=replace(
                recipe.log,
                log_every=max(1, steps // 20),
                validate_every=half,
                save_every=half,
                sample_every=0,
                keep_last=2,
            ),
            steps=steps,
            seed=self.seed,
        )
        digest = json_sha256(
            [_changed(arm.method), arm.optim, experiment.images, experiment.precision]
        )
        folder = f"{arm.name.replace(' ', '-')}-{digest[:8]}-seed{self.seed}-steps{steps}"
        return replace(config, run_dir=experiment.out / self.base / folder)


def _changed(method: TensorARConfig) -> dict:
    """Settings that are not the defaults: options that come later do not rename old runs."""
    default = asdict(TensorARConfig())
    return {k: v for k, v in asdict(method).items() if v != default[k]}


def main() -> None:
    experiment = cli.parse(Experiment, __doc__)
    runs = planned(experiment)
    index, count = share(experiment)
    writable_folder(experiment.out)
    for run in runs[index::count]:
        do(run, experiment)


def planned(experiment: Experiment) -> list[GridRun]:
    """All runs of the grid, seed by seed, so that an early stop leaves complete comparisons.

    Raises:
        UserError: there is no such grid or arm.
    """
    if experiment.grid not in GRIDS:
        raise UserError(f"unknown grid {experiment.grid!r}; choose one of {', '.join(GRIDS)}")
    grid = GRIDS[experiment.grid]
    unknown = set(experiment.arms) - {arm.name for arm in grid}
    if unknown:
        raise UserError(
            f"grid {experiment.grid} has no arm {', '.join(sorted(unknown))}; "
            f"it has {', '.join(arm.name for arm in grid)}"
        )
    bases = [base.partition("=") for base in experiment.bases]
    if not all(weights for _, _, weights in bases):
        raise UserError(f"bases={experiment.bases}: write name=folder")
    chosen = [arm for arm in grid if not experiment.arms or arm.name in experiment.arms]
    return [
        GridRun(base, weights, arm, seed)
        for seed in experiment.seeds
        for base, _, weights in bases
        for arm in chosen
    ]


def share(experiment: Experiment) -> tuple[int, int]:
    index, _, count = experiment.share.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"share={experiment.share}: write i/n with i from 0 to n - 1")
    return int(index), int(count)


def do(run: GridRun, experiment: Experiment) -> None:
    """Train unless it is trained, and score in every way that is not scored yet."""
    from t2i.checkpoint import run_checkpoints

    config, steps = run.config(experiment), experiment.steps
    ways = [(steps, name, options) for name, options in [("", {}), *run.arm.sampling.items()]]
    half = config.log.save_every
    assert half is not None, "set by GridRun.config"
    if run.arm.curve and half < steps:
        ways.insert(0, (half, "", {}))
    done = {line["key"] for line in results(experiment.out)}
    keyed = [
        (key_of(run, experiment, step, options), step, name, options)
        for step, name, options in ways
    ]
    todo = [item for item in keyed if item[0] not in done]
    if not todo:
        return
    from t2i.shapes.fine_tuning import fine_tuned, loaded

    print(f"== {run.base}, {run.arm.name}, seed {run.seed}: {len(todo)} to score", flush=True)
    fine_tuned(config)
    checkpoints = {int(folder.name[5:]): folder for folder in run_checkpoints(config.run_dir)}
    for key, step, name, options in todo:
        line = {"key": key, "base": run.base, "arm": run.arm.name, "seed": run.seed, "steps": steps}
        line |= {"step": step, "sampling": name, "options": options}
        line |= {"method": asdict(run.arm.method), "optim": run.arm.optim}
        line |= scored(loaded(checkpoints[step]), run, experiment, options)
        if step == steps and not name:
            line |= trained(loaded(checkpoints[step]), run, experiment)
        append(experiment.out, line)


def key_of(run: GridRun, experiment: Experiment, step: int, options: dict) -> str:
    """Identifies a result by everything that it depends on."""
    e = experiment
    judged = [e.prompts_per_task, e.samples, options]
    return f"{run.base}/{run.config(e).run_dir.name}/step{step}/{json_sha256(judged)[:8]}"


def scored(model, run: GridRun, experiment: Experiment, options: dict) -> dict:
    """Draw and judge."""
    from t2i.evaluation import evidence
    from t2i.shapes.fine_tuning import examine
    from t2i.shapes.shapes_prompts import benchmark_prompts

    started, sampling = time.time(), replace(model.sampling, **options)
    examined = examine(
        model,
        benchmark_prompts(0, experiment.prompts_per_task),
        seed=run.seed,
        samples=experiment.samples,
        sampling=sampling,
    )
    summary, windows = examined.report.summary, examined.windows
    geometry = model.windows.shrunk(sampling.window, sampling.stride)
    changes = None
    if geometry.stages > 1:
        shares = evidence.stage_changes(windows, geometry)
        changes = {name: by_image.mean(0).tolist() for name, by_image in shares.items()}
    verdicts = [int(v.correct) for v in examined.report.verdicts]
    each = experiment.samples
    return {
        "score": summary.overall,
        "tags": {tag: s.mean for tag, s in summary.tags.items()},
        "correct": [sum(verdicts[i : i + each]) for i in range(0, len(verdicts), each)],
        "changes": changes,
        "seconds_judging": round(time.time() - started, 1),
    }


def trained(model, run: GridRun, experiment: Experiment) -> dict:
    """Losses on the held-out set, their course, and what refinement does there."""
    from t2i.evaluation import evidence
    from t2i.shapes.fine_tuning import held_out, held_out_losses, loaded
    from t2i.training.logs import read_metrics

    config = run.config(experiment)
    facts: dict = {"losses": held_out_losses(config, model)}
    rows = read_metrics(config.run_dir)
    facts["course"] = [row for row in rows if any(k.startswith("validation/") for k in row)]
    control = next((a for a in GRIDS[experiment.grid] if a.name == CONTROL), None)
    if control is not None and model.config.k > 1:
        control_dir = run.config(experiment, control).run_dir
        if (control_dir / "checkpoints").exists():
            batches = (b for b, _ in held_out(config, model).validation_batches())
            facts["repairs"] = evidence.repairs(model, loaded(control_dir), batches)
    return facts


def results(out: Path) -> list[dict]:
    """All lines of results.jsonl."""
    path = out / "results.jsonl"
    return read_json_lines(path) if path.exists() else []


def append(out: Path, line: dict) -> None:
    """Add a line; other processes may do so at the same time."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "results.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
    print(
        json.dumps({k: line[k] for k in ("base", "arm", "seed", "step", "sampling", "score")}),
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)

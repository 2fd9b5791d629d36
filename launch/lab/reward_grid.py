"""Settings and seeds of reward fine-tuning on the shapes world, side by side, some minutes each.

Each run is a process: it scores the start, learns until time or steps are over, and scores again:
GenEval on the quickstart's prompts, which are never trained on, drawn as it learns (unguided) and
as the model is used (guided); DPG-Bench; held-out loss; diversity. No weights are kept. --out gets
one JSON file with all of it, the runs' output, and sheets of one of them.

    python launch/lab/reward_grid.py --grid rates --processes 5 --minutes 2.5 --out runs/reward-grid
    python launch/lab/reward_grid.py --grid recipe --seeds 3 --minutes 30 --out runs/reward
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.charts import Chart, Series, save_chart
from t2i.errors import UserError
from t2i.reward import reward_recipes
from t2i.reward.options import RewardConfig

_ONE_WAY = {
    "optim.backbone_lr": 3e-4,
    "ema": 0.0,
    "reward.tasks": ("two_object", "counting", "colors", "position", "color_attr"),
}
"""The first grid's settings, of which each other one changes something."""
_GPU = {"reward.workers": 2, "reward.draw_batch": 256}
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {"recipe": {}},
    "rates": {
        "rate 1e-4": _ONE_WAY | {"optim.backbone_lr": 1e-4},
        "rate 3e-4": _ONE_WAY,
        "rate 1e-3": _ONE_WAY | {"optim.backbone_lr": 1e-3},
        "64 images": _ONE_WAY | {"batch_size": 64, "reward.group": 8},
        "no pull": _ONE_WAY | {"reward.kl": 0.0},
    },
    "ways": {
        "1e-4": _GPU,
        "5e-5": _GPU | {"optim.backbone_lr": 5e-5},
        "adapters 5e-4": _GPU | {"optim.backbone_lr": 5e-4, "tuning": "lora"},
    },
}
"""By name: settings by name, each options that differ from the recipe."""
_KEPT = ("reward/", "policy/", "train/grad_norm", "seconds/")


@dataclass(frozen=True)
class RewardGrid:
    """What to run."""

    out: Path = Path("runs/reward-grid")
    """Folder of what is written."""
    grid: Literal["recipe", "rates", "ways"] = "recipe"
    """Which settings."""
    recipe: str = "shapes-reward"
    """Recipe that they change."""
    weights: str = ""
    """Model to start from; empty: the recipe's."""
    seeds: int = 2
    """Runs of each setting."""
    processes: int = 1
    """Runs at the same time."""
    minutes: float = 5.0
    """Of learning, in each run; scoring comes on top."""
    steps: int = 1000
    """At most."""
    prompts: int = 20
    """Of each task, that score a model."""
    samples: int = 4
    """Images of each of these."""
    one: str = ""
    """For the program itself: the setting of one run."""
    seed: int = 0
    """For the program itself: its seed."""


def main() -> None:
    options = cli.parse(RewardGrid, __doc__)
    if options.one:
        run_one(options)
    else:
        run_all(options)


# -- one run ---------------------------------------------------------------------------------------
def configured(options: RewardGrid, run_dir: Path) -> RewardConfig:
    """The recipe with the setting's changes."""
    changes = GRIDS[options.grid][options.one]
    config = reward_recipes.recipes()[options.recipe][1]
    weights = options.weights or config.backbone.weights
    parts: dict[str, dict[str, Any]] = {
        "log": {"sample_every": 0},
        "backbone": {"weights": weights},
    }
    own: dict[str, Any] = {"run_dir": run_dir, "seed": options.seed, "steps": options.steps}
    for name, value in changes.items():
        part, dot, option = name.partition(".")
        if dot:
            parts.setdefault(part, {})[option] = value
        else:
            own[part] = value
    nested = {part: replace(getattr(config, part), **given) for part, given in parts.items()}
    data = replace(config.data, cache_dir=run_dir / "cache")
    return replace(config, **nested, **own, data=data)


def run_one(options: RewardGrid) -> None:
    """Score, learn, score."""
    from t2i.imaging import save_png
    from t2i.reward.reward_run import RewardRun
    from t2i.training import run_state
    from t2i.training.engine import start_processes

    with tempfile.TemporaryDirectory(prefix="reward-grid-") as scratch:
        config = configured(options, Path(scratch) / "run")
        with run_state.owned(config, start_processes()):
            run = RewardRun(config)
            before, first = looked_at(run, options)
            rows, started = [], time.perf_counter()
            while run.step < options.steps and time.perf_counter() - started < 60 * options.minutes:
                row = run.train_step()
                rows.append({k: round(v, 5) for k, v in row.items() if k.startswith(_KEPT)})
            seconds = time.perf_counter() - started
            after, last = looked_at(run, options)
    found: dict[str, Any] = {"setting": options.one, "changes": GRIDS[options.grid][options.one]}
    found |= {"seed": options.seed, "steps": len(rows), "seconds": seconds}
    found |= {"batch_size": config.batch_size, "before": before, "after": after, "rows": rows}
    name = _name(options.one, options.seed)
    (options.out / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    if options.seed == 0 and options.one == next(iter(GRIDS[options.grid])):
        save_png(first, options.out / "before.png")
        save_png(last, options.out / "after.png")


def looked_at(run, options: RewardGrid):
    """Scores of the model as it is, and a sheet of images of its prompts."""
    from t2i.generation import draw_images
    from t2i.imaging import grid
    from t2i.sampling import DrawOptions
    from t2i.shapes.fine_tuning import examine
    from t2i.shapes.shapes_prompts import benchmark_prompts

    prompts = benchmark_prompts(per_tag=options.prompts)
    found: dict[str, Any] = run.validate()
    ways = {"unguided": run.config.reward.sampling, "guided": run.model.sampling}
    for way, sampling in ways.items():
        with run.averaged():
            report = examine(run.model, prompts, seed=0, samples=options.samples, sampling=sampling)
        summary = report.report.summary
        found[way] = summary.overall
        found[f"{way} tasks"] = {tag: score.mean for tag, score in summary.tags.items()}
    shown = [entry["prompt"] for entry in prompts[:: max(1, len(prompts) // 14)]][:14]
    drawing = DrawOptions(0, run.config.reward.sampling)
    with run.averaged():
        images = [one.image for one in draw_images(run.model, shown, drawing, progress=False)]
    labels = [text.removeprefix("a photo of ") for text in shown]
    return found, grid(images, columns=7, labels=labels, cell=160)


# -- all runs --------------------------------------------------------------------------------------
def run_all(options: RewardGrid) -> None:
    """Every setting with every seed, so many at the same time."""
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = [(name, seed) for seed in range(options.seeds) for name in GRIDS[options.grid]]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < options.processes:
            name, seed = waiting.pop(0)
            running[name, seed] = _start(options, name, seed)
        time.sleep(0.5)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if process.returncode:
                    failed.append(job)
    print(collect(options))
    if failed:
        raise UserError(f"{len(failed)} runs failed: {failed}; see {options.out}/*.log")


def _start(options: RewardGrid, name: str, seed: int) -> subprocess.Popen:
    given: dict[str, Any] = {"out": options.out, "grid": options.grid, "recipe": options.recipe}
    given |= {
        "prompts": options.prompts,
        "minutes": options.minutes,
        "steps": options.steps,
        "samples": options.samples,
    }
    given |= {"one": name, "seed": seed} | ({"weights": options.weights} if options.weights else {})
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    with (options.out / f"{_name(name, seed)}.log").open("w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.Popen(
            [sys.executable, __file__, *words], stdout=file, stderr=file, env=environment
        )


def _name(setting: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{setting}-seed{seed}")


def collect(options: RewardGrid) -> str:
    """All runs into one file, and a table of them."""
    parts = sorted(options.out.glob("*-seed*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    (options.out / "reward_grid.json").write_text(json.dumps(runs), encoding="utf-8")
    for path in parts:
        path.unlink()
    if runs:
        save_chart(curves(runs), options.out / "curve")
    columns = ("unguided", "guided", "watch/dpg", "watch/diversity", "validation/own_drafts/slot0")
    lines = ["| setting | seed | steps | images | seconds | " + " | ".join(columns) + " | kl |"]
    lines.append("|---|" + "---|" * (len(columns) + 5))
    for run in sorted(runs, key=lambda run: (run["setting"], run["seed"])):
        cells = [run["setting"], run["seed"], run["steps"], run["steps"] * run["batch_size"]]
        cells += [f"{run['seconds']:.0f}"]
        cells += [f"{run['before'][c]:.3f} -> {run['after'][c]:.3f}" for c in columns]
        cells += [f"{run['rows'][-1]['policy/kl']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def curves(runs: list[dict]) -> Chart:
    """Every run's mean reward against images, the mean of ten steps at a time."""
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    series = []
    for run in runs:
        values = [row["reward/mean"] for row in run["rows"]]
        means = [fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        points = tuple(((i + 1) * run["batch_size"], mean) for i, mean in enumerate(means))
        name = f"{run['setting']}, seed {run['seed']}"
        series.append(Series(name, points[4:] or points, settings.index(run["setting"])))
    return Chart("Reward", "images drawn", "mean of what is drawn, over ten steps", tuple(series))


if __name__ == "__main__":
    cli.run(main)

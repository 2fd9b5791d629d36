"""Reward fine-tuning on the shapes world with several settings and seeds, compared with supervised
fine-tuning for the same time, from the same start and scored on the same prompts and seeds.

Each run is a process, which scores the start, trains, and scores the model again at regular times:
GenEval on the quickstart's prompts, which are never trained on, drawn as in training (unguided) and
as the model is used (guided); DPG-Bench; held-out loss; diversity. On a CPU, minutes are processor
time, which other programs do not lengthen. --out gets a file for each run, and one for all. The
same command again resumes interrupted runs at their last scores, and with more --minutes also
continues finished ones.

    python launch/lab/reward_grid.py --grid recipe --seeds 3 --minutes 60 --out runs/reward
    python launch/lab/reward_grid.py --grid rates --processes 5 --minutes 2.5 --out runs/rates
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.charts import Chart, Series, save_chart
from t2i.errors import UserError, choose_one
from t2i.evaluation.results import markdown_table
from t2i.files import read_json, write_json, write_text
from t2i.ownership import owning
from t2i.reward import reward_recipes
from t2i.reward.reward_options import RewardConfig
from t2i.training.config import DataOptions, TrainConfig

_ONE_WAY = {
    "optim.backbone_lr": 3e-4,
    "ema": 0.0,
    "reward.tasks": ("two_object", "counting", "colors", "position", "color_attr"),
}
"""What the settings of the grid `rates` have in common."""
_AS_USED = {"sampling.cfg_scale": 2.5, "sampling.top_p": 0.95}
"""The base's default sampling, with which guided scores are drawn."""
SUPERVISED = "supervised"
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {"recipe": {}, SUPERVISED: {}},
    "guided": {
        "guided": _AS_USED | {"base": "shapes-guided"},
        "guided, then rewarded": _AS_USED | {"after": "guided", "reward.kl": 0.0},
        SUPERVISED: {},
    },
    "ways": {
        "recipe": {},
        "rate 5e-5": {"optim.backbone_lr": 5e-5},
        "adapters": {"optim.backbone_lr": 5e-4, "tuning": "lora"},
        "two updates": {"reward.updates": 2},
        "spread of all": {"reward.by_spread": False},
        "hardest tasks": {"reward.tasks": ("counting", "position", "color_attr")},
    },
    "rates": {
        "rate 1e-4": _ONE_WAY | {"optim.backbone_lr": 1e-4},
        "rate 3e-4": _ONE_WAY,
        "rate 1e-3": _ONE_WAY | {"optim.backbone_lr": 1e-3},
        "64 images": _ONE_WAY | {"batch_size": 64, "reward.group": 8},
        "no pull": _ONE_WAY | {"reward.kl": 0.0},
    },
}
"""For each grid its settings, and for each setting the options that differ from the recipe. "base"
names another recipe to change, which keeps its own steps; "after" names the setting whose run with
the same seed is continued.
"""
_KEPT = ("reward/", "policy/", "train/", "seconds/")


@dataclass(frozen=True)
class RewardGrid:
    """What to run."""

    out: Path = Path("runs/reward-grid")
    """Folder for all results."""
    grid: str = "recipe"
    """Which settings to run: recipe, guided, ways or rates."""
    recipe: str = "shapes-reward"
    """Recipe that the settings change."""
    control: str = "shapes-control"
    """Recipe for supervised fine-tuning."""
    images: int = 6400
    """Number of fresh scenes: supervised runs train on them, and the held-out loss of every run is
    measured on their held-out part.
    """
    weights: str = ""
    """Model to start from; empty: the recipe's."""
    seeds: int = 2
    """Runs per setting."""
    processes: int = 1
    """Runs at the same time."""
    minutes: float = 5.0
    """Training time of each run, without scoring."""
    every: float = 10.0
    """Training minutes between scores."""
    steps: int = 100_000
    """Largest number of steps of a run; settings with their own recipe use that recipe's."""
    prompts: int = 20
    """Prompts of each task to score a model with."""
    samples: int = 4
    """Images per prompt."""
    draw_batch: int = 96
    """Images drawn at once for scoring."""
    one: str = ""
    """Used by the program itself: run only this setting, in this process."""
    seed: int = 0
    """Used by the program itself: the seed of that run."""


def main() -> None:
    options = cli.parse(RewardGrid, __doc__)
    if options.grid not in GRIDS:
        raise UserError(f"unknown grid {options.grid!r}; {choose_one(options.grid, GRIDS)}")
    if options.one:
        run_one(options)
    else:
        run_all(options)


# -- one run ---------------------------------------------------------------------------------------
def rewarded(options: RewardGrid) -> RewardConfig:
    """The recipe with the changes of the setting `options.one`."""
    changes = GRIDS[options.grid][options.one]
    config = reward_recipes.recipes()[changes.get("base", options.recipe)][1]
    parts: dict[str, dict[str, Any]] = {"reward": {"watch": ()}}
    own: dict[str, Any] = {} if "base" in changes else {"steps": options.steps}
    for name, value in changes.items():
        if name in ("base", "after"):
            continue
        part, dot, option = name.partition(".")
        if dot:
            parts.setdefault(part, {})[option] = value
        else:
            own[part] = value
    nested = {part: replace(getattr(config, part), **given) for part, given in parts.items()}
    return replace(config, **nested, **own)


def configured(options: RewardGrid) -> TrainConfig:
    """The configuration of the run with setting `options.one` and seed `options.seed`."""
    from t2i.checkpoint_folders import find_checkpoint
    from t2i.training.recipes import recipes_for

    config: TrainConfig = rewarded(options)
    assert isinstance(config.data, DataOptions), "captioned scenes"
    # Also for runs that only draw: the same scenes are held out in all of them.
    data = replace(config.data, source=f"shapes:{options.images}")
    weights = options.weights or config.backbone.weights
    if options.one == SUPERVISED:
        config = replace(recipes_for(DataOptions)[options.control][1], steps=options.steps)
    elif first := _before(options, options.one):
        weights = str(find_checkpoint(_work(options, first)))
    return replace(
        config,
        run_dir=_work(options, options.one),
        seed=options.seed,
        data=replace(data, cache_dir=options.out / "cache"),
        backbone=replace(config.backbone, weights=weights),
        log=replace(config.log, sample_every=0, validate_every=0, save_every=0, keep_last=1),
    )


def run_one(options: RewardGrid) -> None:
    """Train and score in turn, from the start or from the last scores."""
    from t2i.imaging import save_png
    from t2i.reward.reward_run import RewardRun
    from t2i.training import run_state
    from t2i.training.engine import start_processes
    from t2i.training.training_run import Run

    name = _name(options.one, options.seed)
    path, config = options.out / f"{name}.json", configured(options)
    found = read_json(path) if path.is_file() else {}
    steps = config.steps
    assert steps is not None, "a run on drawn images or fresh scenes has a number of steps"
    if found and (found["minutes"] >= options.minutes or found["steps"] >= steps):
        return
    config = replace(config, resume=found.get("steps", 0) > 0)
    with run_state.owned(config, start_processes()):
        run = RewardRun(config) if isinstance(config, RewardConfig) else Run(config)
        run.learning_mode()
        score = Scorer(run, options)
        if not found:
            changes = GRIDS[options.grid][options.one]
            found = {"setting": options.one, "changes": changes, "seed": options.seed}
            found |= {"steps": 0, "minutes": 0.0, "batch_size": config.batch_size, "rows": []}
            if first := _before(options, options.one):
                earlier = read_json(options.out / f"{_name(first, options.seed)}.json")
                found |= {key: earlier[key] for key in ("minutes", "scores")}
            else:
                found["scores"] = [_start_scores(options, score)]
            write_json(path, found)
        while found["minutes"] < options.minutes and run.step < steps:
            until = min(found["minutes"] + options.every, options.minutes)
            while found["minutes"] < until and run.step < steps:
                started = _seconds(run)
                row = run.train_step()
                found["minutes"] += (_seconds(run) - started) / 60
                kept = {k: round(v, 5) for k, v in row.items() if k.startswith(_KEPT)}
                found["rows"].append(kept)
            scores, sheet = score()
            found["scores"].append(scores | {"minutes": found["minutes"], "step": run.step})
            found["steps"] = run.step
            run.save()
            save_png(sheet, options.out / f"{name}.png")
            write_json(path, found)


def _start_scores(options: RewardGrid, score: "Scorer") -> dict:
    """Scores of the model that all runs in this folder start from; measured only once."""
    from t2i.imaging import save_png

    path = options.out / "start.json"
    if not path.is_file():
        scores, sheet = score()
        save_png(sheet, options.out / "start.png")
        write_json(path, scores)
    return read_json(path)


def _before(options: RewardGrid, setting: str) -> str | None:
    """The setting whose run this setting continues, if any."""
    return GRIDS[options.grid][setting].get("after")


def _work(options: RewardGrid, setting: str) -> Path:
    """Run folder of a setting with this process's seed."""
    return options.out / "work" / _name(setting, options.seed)


def _seconds(run) -> float:
    """Processor time, which other programs do not lengthen; wall-clock time if a GPU is used."""
    on_cpu = run.processes.device.type == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()


class Scorer:
    """Scores a run's model in its present state, and draws a sheet of images."""

    def __init__(self, run, options: RewardGrid):
        import torch

        from t2i.reward.panel import Panel
        from t2i.reward.reward_watch import WatchedBenchmarks
        from t2i.reward.rewards import load_rewards
        from t2i.shapes.shapes_prompts import benchmark_prompts

        self.run, self.options = run, options
        config = replace(rewarded(options), seed=0)  # every run draws the same images
        watched = replace(config.reward, watch=("dpg",), watch_prompts=0, cfg_scale=1.0)
        self.config = replace(config, reward=replace(watched, draw_batch=options.draw_batch))
        rewards = load_rewards(("dpg",), watched, torch.device("cpu"))
        panel = Panel(rewards, {"dpg": 1.0}, seconds=watched.seconds, constant=watched.constant)
        self.watch = WatchedBenchmarks(self.config, panel, run.processes)
        self.prompts = benchmark_prompts(per_tag=options.prompts)

    def __call__(self):
        from t2i.generation import draw_images
        from t2i.imaging import grid
        from t2i.sampling import DrawOptions
        from t2i.shapes.fine_tuning import examine

        run, options, unguided = self.run, self.options, self.config.reward.sampling
        found: dict[str, Any] = run.validate()
        run.model.eval()
        shown = [entry["prompt"] for entry in self.prompts[:: max(1, len(self.prompts) // 14)]][:14]
        with run.average.applied():
            found |= self.watch(run.model)
            for way, sampling in {"unguided": unguided, "guided": run.model.sampling}.items():
                how = {"samples": options.samples, "sampling": sampling}
                how["batch_size"] = options.draw_batch
                summary = examine(run.model, self.prompts, seed=0, **how).report.summary
                found |= {way: summary.overall, f"{way} error": summary.overall_stderr}
                found[f"{way} tasks"] = {tag: score.mean for tag, score in summary.tags.items()}
            drawing = DrawOptions(0, unguided)
            images = [one.image for one in draw_images(run.model, shown, drawing, progress=False)]
        run.learning_mode()
        labels = [text.removeprefix("a photo of ") for text in shown]
        return found, grid(images, columns=7, labels=labels, cell=160)


# -- all runs --------------------------------------------------------------------------------------
def run_all(options: RewardGrid) -> None:
    """Run every setting with every seed, `options.processes` at a time, and print the table."""
    waiting = [(name, seed) for seed in range(options.seeds) for name in GRIDS[options.grid]]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    failed = []
    with owning(options.out, "reward grid"):
        while waiting or running:
            busy = {*waiting, *running}
            ready = [
                (name, seed) for name, seed in waiting if (_before(options, name), seed) not in busy
            ]
            for name, seed in ready[: options.processes - len(running)]:
                waiting.remove((name, seed))
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
    given = vars(options) | {"one": name, "seed": seed}
    words = [
        word
        for key, value in given.items()
        if value != ""
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    with (options.out / f"{_name(name, seed)}.log").open("a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.Popen(
            [sys.executable, __file__, *words], stdout=file, stderr=file, env=environment
        )


def _name(setting: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{setting}-seed{seed}")


def collect(options: RewardGrid) -> str:
    """Write all runs into one file, plot them, and return a table of them."""
    runs = [read_json(path) for path in sorted(options.out.glob("*-seed*.json"))]
    write_text(options.out / "reward_grid.json", json.dumps(runs))
    for name, chart in curves(runs).items():
        if chart.series:
            save_chart(chart, options.out / name)
    columns = ("unguided", "guided", "watch/dpg", "watch/diversity", "validation/own_drafts/slot0")
    rows = []
    for run in sorted(runs, key=lambda run: (run["setting"], run["seed"])):
        first, last = run["scores"][0], run["scores"][-1]
        cells = [run["setting"], run["seed"], run["steps"], f"{run['minutes']:.1f}"]
        cells += [f"{first[c]:.3f} -> {last[c]:.3f}" for c in columns]
        divergence = run["rows"][-1].get("policy/kl") if run["rows"] else None
        cells += ["" if divergence is None else f"{divergence:.3f}"]
        rows.append(cells)
    return markdown_table(["setting", "seed", "steps", "minutes", *columns, "kl"], rows)


def curves(runs: list[dict]) -> dict[str, Chart]:
    """Charts by file name: each run's unguided score against minutes, and the mean reward of its
    last ten steps against images drawn.
    """
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    scores, rewards = [], []
    for run in runs:
        name, color = f"{run['setting']}, seed {run['seed']}", settings.index(run["setting"])
        marks = [(one.get("minutes", 0.0), one["unguided"]) for one in run.get("scores", ())]
        if marks:
            scores.append(Series(name, tuple(marks), color))
        values = [row["reward/mean"] for row in run["rows"] if "reward/mean" in row]
        means = [fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        points = tuple(((i + 1) * run["batch_size"], mean) for i, mean in enumerate(means))
        if points:  # none: supervised runs draw no images
            rewards.append(Series(name, points[4:] or points, color))
    title, axis = "Unseen prompts, unguided", "minutes of one core"
    return {
        "scores": Chart(title, axis, "GenEval", tuple(scores)),
        "rewards": Chart("Reward", "images drawn", "mean over ten steps", tuple(rewards)),
    }


if __name__ == "__main__":
    cli.run(main)

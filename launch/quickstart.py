"""Run the whole kit offline, on the shapes world, in minutes on two CPU cores.

Builds a data set, fine-tunes the shipped base as usual (the control) and with TensorAR for the same
number of steps in the same data order, draws held-out prompts with all three, judges the images
with GenEval's rules and an exact detector, and writes to --out:

    comparison.png   base, control and TensorAR at the same seeds, and TensorAR's refinement stages
    results.json     scores with standard errors, and held-out losses by slot
    geneval/<name>/  images, verdicts, report and failure gallery of each model
    <recipe>/        each run: metrics.jsonl, sample sheets, index.html, checkpoint

    python launch/quickstart.py                                    # the README's table
    python launch/quickstart.py --control shapes-janus-control \\
        --recipes shapes-janus-lora --out runs/janus-table
    python launch/quickstart.py --recipes shapes-iclr2026 shapes-arxiv2505 shapes-tuned
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError, choose_one
from t2i.fields import plain
from t2i.sampling import check_counts, check_seed
from t2i.training.config import DataOptions
from t2i.training.recipes import recipes_for


@dataclass(frozen=True)
class Quickstart:
    """What to run."""

    out: Path = Path("runs/quickstart")
    """Folder for everything; finished runs in it are not repeated."""
    recipes: tuple[str, ...] = ("shapes-tuned",)
    """Recipes to compare with the control."""
    control: str = "shapes-control"
    """Recipe of the control, which also determines the base that is judged."""
    steps: int = 200
    """Optimizer steps of each run."""
    images: int = 3000
    """Size of the data set."""
    prompts_per_task: int = 20
    """Benchmark prompts for each of GenEval's six tasks."""
    samples: int = 4
    """Images per benchmark prompt."""
    seed: int = 0
    """Seed of training and sampling."""

    def __post_init__(self):
        check_counts(prompts_per_task=self.prompts_per_task, samples=self.samples)
        check_counts(steps=self.steps, images=self.images)
        check_seed(self.seed)


def main() -> None:
    config = cli.parse(Quickstart, __doc__)
    from t2i.ownership import owning

    control = run_config(config, config.control)
    base, held_out = control.backbone.weights, control.data.validation_samples or 0
    if config.images <= held_out:  # before any work
        raise UserError(
            f"images={config.images} must be more than the {held_out} that {config.control} holds "
            "out of training"
        )
    for name in config.recipes:
        if (own := run_config(config, name).backbone.weights) != base:
            raise UserError(
                f"{name} starts from {own}, but its control {config.control} from {base}: give "
                "--control and --recipes that start from the same base"
            )
    with owning(config.out, "quickstart folder"):
        compare(config)


def compare(config: Quickstart) -> None:
    """Fine-tune and judge the models, and write everything to the existing folder `config.out`."""
    from t2i.files import write_json
    from t2i.loading import attach, load_backbone
    from t2i.shapes.fine_tuning import fine_tuned, held_out_losses
    from t2i.shapes.shapes_prompts import benchmark_prompts
    from t2i.shapes.shapes_source import FINE_TUNING_SEED, write_dataset
    from t2i.tensorar.presets import base
    from t2i.training.engine import start_processes

    started = time.time()
    written, kept = write_dataset(config.out / "data", config.images, seed=FINE_TUNING_SEED)
    print(f"[1/3] data set: {written} images drawn, {kept} already there")
    control = run_config(config, config.control)
    backbone = load_backbone(
        control.backbone.family,
        control.backbone.weights,
        device=start_processes().device,
        dtype="float32",
    )
    models = {"base": attach(backbone, base())}
    for name in (config.control, *config.recipes):
        print(f"[2/3] fine-tuning: {name}")
        models[name] = fine_tuned(run_config(config, name))
    losses = {name: held_out_losses(control, model) for name, model in models.items()}
    metadata = benchmark_prompts(config.seed, config.prompts_per_task)
    print(f"[3/3] judging {len(metadata)} prompts x {config.samples} images of each model")
    scores = {name: scores_of(model, name, metadata, config) for name, model in models.items()}
    write_comparison(models, config)
    content = {"settings": plain(config), "scores": scores, "held_out_losses": losses}
    write_json(config.out / "results.json", content)
    print(table(scores, losses))
    print(
        f"\nlook at {config.out / 'comparison.png'}   ({(time.time() - started) / 60:.1f} minutes)"
    )


def run_config(config: Quickstart, name: str):
    """The training run of a recipe inside this quickstart's folder."""
    recipes = recipes_for(DataOptions)
    if name not in recipes:
        raise UserError(f"unknown recipe {name!r}; {choose_one(name, recipes)}")
    recipe = recipes[name][1]
    assert isinstance(recipe.data, DataOptions), "recipes for captions"
    control = None if name == config.control else config.out / config.control
    return replace(
        recipe,
        run_dir=config.out / name,
        log=replace(recipe.log, control=control),
        data=replace(recipe.data, source=str(config.out / "data"), cache_dir=config.out / "cache"),
        steps=config.steps,
        seed=config.seed,
    )


def scores_of(model, name: str, metadata: list[dict], config: Quickstart) -> dict[str, dict]:
    """A model's GenEval scores by name; writes files and gallery, as `geneval/run.py` does."""
    from geneval.detectors import load_detector
    from geneval.geneval_benchmark import GenEval
    from t2i.evaluation.evaluation_options import Scope
    from t2i.evaluation.runner import evaluate
    from t2i.sampling import DrawOptions

    results = evaluate(
        GenEval(metadata, load_detector("shapes"), prompts="shapes"),
        config.out / "geneval" / name,
        model=model,
        scope=Scope(samples=config.samples),
        draw=DrawOptions(seed=config.seed, batch_size=48),
    )
    return results["scores"]


def write_comparison(models: dict, config: Quickstart) -> None:
    """Draw the same prompts and seeds with every model, then show the stages of the last one."""
    from t2i.generation import draw_images, generate
    from t2i.imaging import grid, save_png
    from t2i.sampling import DrawOptions

    prompts = (
        "a photo of a red circle",
        "a photo of three stars",
        "a photo of a green heart and a blue ring",
        "a photo of a triangle above a square",
        "a photo of a purple diamond and an orange cross",
        "a photo of a heart right of a star",
    )
    images, labels = [], []
    for name, model in models.items():
        images += generate(
            model, prompts, seed=config.seed, batch_size=len(prompts), progress=False
        )
        short = name.removeprefix("shapes-")
        labels += [f"{short}: {p.removeprefix('a photo of ')}" for p in prompts]
    last, model = list(models.items())[-1]
    short = last.removeprefix("shapes-")
    drawing = DrawOptions(config.seed, batch_size=len(prompts), stages=True)
    staged = [drawn.stages for drawn in draw_images(model, prompts, drawing, progress=False)]
    for r, of_stage in enumerate(zip(*staged, strict=True), start=1):
        images += of_stage
        labels += [f"{short}: stage {r} of {len(staged[0])}"] * len(prompts)
    save_png(
        grid(images, columns=len(prompts), labels=labels, cell=192), config.out / "comparison.png"
    )


def table(scores: dict, losses: dict) -> str:
    """A markdown table: scores by task and overall, held-out losses by slot."""
    from geneval.prompts import TAGS
    from t2i.evaluation.results import markdown_table

    head = ["model", *TAGS, "overall", "loss, noised truth (slots)", "loss, own drafts (slots)"]
    rows = []
    for name, found in scores.items():
        cells = [f"{found[tag]['mean']:.2f}" for tag in TAGS]
        overall, error = found["overall"]["mean"], found["overall"]["stderr"]
        cells += [f"**{overall:.3f}**" + ("" if error is None else f" ± {error:.3f}")]
        cells += [_slots(losses.get(name, {}), kind) for kind in ("noised_truth", "own_drafts")]
        rows.append([name, *cells])
    return markdown_table(head, rows)


def _slots(losses: dict, kind: str) -> str:
    values = [v for k, v in sorted(losses.items()) if f"/{kind}/" in k]
    return " / ".join(f"{v:.3f}" for v in values) or "-"


if __name__ == "__main__":
    cli.run(main)

"""Analyze a checkpoint: what refinement changes, how good the drafts are, and what they cost.

python launch/analyze.py --ckpt runs/mine
# compared with the base fine-tuned as usual for the same steps
python launch/analyze.py --ckpt runs/mine --control runs/control --out outputs/analysis

Shows the flip rate by stage; how far drafts are from the final codes, as codes and as
distributions; loss and entropy by slot on the run's held-out images; parameters and operations
compared with the base. Writes one page that needs no server, its charts as SVG and PNG, and its
numbers as JSON.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli, launcher
from t2i.errors import UserError
from t2i.model_options import BaseOptions, DrawingModelOptions
from t2i.ownership import owning, remove_leftovers
from t2i.sampling import DrawOptions, check_counts

if TYPE_CHECKING:
    from t2i.charts import Chart
    from t2i.generation import Drawn
    from t2i.tensorar.model import TensorAR
    from t2i.training.batches import Batch, TrainingData
    from t2i.training.config import TrainConfig

_MAIN = ("ckpt", "control", "prompt", "prompt_file", "samples", "held_out", "data", "out")
_ON_SHEET = 8
"""Number of images whose stages the page shows."""
_NOTES = (
    "Means are over images, and ± is the standard error over images, not over training seeds.",
    "Stage 1 is a code's first draft, the last stage is the final code; only positions that went "
    "through all stages count.",
    "Drafts and final codes are drawn with independent noise, so even two draws from the same "
    "distribution often differ. Compare agreement with that of two draws from the final "
    "distribution. Total variation (0: the same distribution, 1: nothing in common) tells how "
    "much refinement changes the model's prediction.",
    "Total variation and the entropy as drawn describe the distributions that codes were drawn "
    "from, with guidance, temperature and filters; loss and entropy of held-out images describe "
    "the model's own distributions, without them.",
    "Own drafts: after each true code the model reads drafts that it sampled itself, as when it "
    "draws. Noised truth: the drafts are true codes with training's noise, so the model can copy "
    "some of them.",
)
_NO_RENOISE = "renoise changes drafts after they are drawn: analyze with --renoise 0"


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(DrawingModelOptions):
    """Which model to analyze, and on which prompts and images."""

    control: str | None = None
    """Checkpoint to compare with, ideally the base fine-tuned as usual for the same steps."""
    prompt: tuple[str, ...] = ()
    """Prompts or class ids; if none are given, those of the run's held-out images or of its sample
    sheets.
    """
    prompt_file: Path | None = None
    """File with one prompt per line, or .jsonl with a "prompt" in every line."""
    prompts: int = 8
    """Number of the run's prompts to use when no prompts are given."""
    samples: int = 4
    """Images per prompt."""
    held_out: int = 64
    """Largest number of the run's held-out images to use; 0 for none."""
    data: str | None = None
    """Where the training data (--data.source) are now, if they have moved since the run."""
    out: Path = Path("outputs/analysis")
    """Folder for the page and its files."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(samples=self.samples, prompts=self.prompts)
        if self.held_out < 0:
            raise UserError(f"held_out={self.held_out} must be a number of images, or 0")
        if self.sampling.renoise:
            raise UserError(_NO_RENOISE)
        if self.data is not None and self.held_out == 0:
            raise UserError("--data has no effect with --held-out 0: leave out one of them")
        if self.prompts != AnalyzeConfig.prompts and (self.prompt or self.prompt_file):
            raise UserError("--prompts has no effect with prompts of your own: leave it out")

    def models(self) -> dict[str, DrawingModelOptions]:
        """The model, and the control if there is one."""
        found = {"model": self.of_model()}
        if self.control is not None:
            found["control"] = replace(found["model"], ckpt=self.control, base=BaseOptions())
        return found


def main() -> None:
    config = cli.parse(AnalyzeConfig, __doc__, main=_MAIN)
    launcher.refuse_several()
    options = config.models()
    wheres = {who: own.check() for who, own in options.items()}
    from t2i.evaluation.evidence_page import TITLE, write_evidence
    from t2i.pages import refuse_other_page

    _typed(config)  # reports an unreadable prompt file before any work
    refuse_other_page(config.out / "index.html", TITLE)
    with owning(config.out, "analysis folder"):
        remove_leftovers(config.out)
        models = {who: own.load(*wheres[who]) for who, own in options.items()}
        evidence, drawn = examine(config, options, models)
        sheets = _write_sheets(config.out, drawn)
        course = _course(options, evidence["missing"])
        page = write_evidence(config.out, evidence, course, sheets)
    for line in evidence["missing"]:
        print(f"missing: {line}", file=sys.stderr)
    print(f"look at {page}")


def examine(
    config: AnalyzeConfig, options: "dict[str, DrawingModelOptions]", models: "dict[str, TensorAR]"
) -> "tuple[dict, list[Drawn]]":
    """All numbers of the page, and the images that the model drew for them."""
    from launch.measure.cost import FORMULAS, cost_of
    from t2i.evaluation.evidence import known_means, loss_difference, of_drawn, of_known, repairs
    from t2i.generation import draw_images, images_per_batch, parse_conditions

    model, control = models["model"], models.get("control")
    missing = list(_unlike(options, models))
    drawings = {who: _drawing(options[who], one, who) for who, one in models.items()}
    parse_conditions(model.backbone, _typed(config))  # reports wrong classes before the work
    data, batches = _held_out(config, options["model"], model, missing)
    prompts = _prompts(config, options["model"], model, data)
    facts: dict = {"control": None}
    kept: list[Drawn] = []
    known = {who: of_known(one, batches) for who, one in models.items()}
    for who, one in models.items():
        drawing, samples = drawings[who], config.samples
        sampling = drawing.sampling
        assert sampling is not None, "settled by the options"
        drawn = list(draw_images(one, prompts, drawing, samples_per_prompt=samples))
        kept = kept or drawn
        facts[who] = {
            "about": options[who].name(),
            **options[who].about(one),
            "sampling": asdict(sampling),
            "drawn": of_drawn(one, drawn, sampling, images_per_batch(one, drawing)),
            "known": known_means(known[who]),
        }
    if "stages" not in facts["model"]["drawn"]:
        missing.append("refinement stages: with these settings every code is drawn only once")
    compared = control is not None and bool(batches)
    drafts = compared and model.config.k > 1
    found = {
        "name": options["model"].name(),
        **facts,
        "against_control": loss_difference(*known.values()) if compared else None,
        "repairs": repairs(model, models["control"], batches) if drafts else None,
        "cost": cost_of(model),
        "settings": {
            "seed": config.seed,
            "prompts": [str(prompt) for prompt in prompts],
            "images": len(kept),
            "held_out": sum(len(batch.codes) for batch in batches),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "missing": missing,
        "notes": _NOTES,
        "formulas": FORMULAS,
    }
    return found, kept


def _unlike(
    options: "dict[str, DrawingModelOptions]", models: "dict[str, TensorAR]"
) -> Iterator[str]:
    """Reasons why the comparison with a control is missing or unfair.

    Raises:
        UserError: the control draws other codes or is of another family, so there is nothing to
            compare.
    """
    if "control" not in models:
        yield "a control: give --control (the base fine-tuned as usual for the same steps)"
        return
    own, other = (models[who].backbone.spec for who in ("model", "control"))
    if own.family != other.family:  # the same numbers then mean other codes
        raise UserError(
            f"the model is of the family {own.family} and the control of {other.family}: give a "
            "--control that was trained from the same base"
        )
    if (own.subvocabs, own.grid, own.cond_kind) != (other.subvocabs, other.grid, other.cond_kind):
        raise UserError(
            "the control draws other codes: give a --control that was trained from the same base"
        )
    # A base, which was not trained here, has no number of steps.
    steps = [options[who].about(models[who]).get("step", 0) for who in ("model", "control")]
    if steps[0] != steps[1]:
        mine, its = ("an unknown number" if n is None else n for n in steps)
        yield (
            f"a control trained for as many steps: the model was trained for {mine}, the control "
            f"for {its}"
        )


# -- the run's own data ----------------------------------------------------------------------------
def _held_out(
    config: AnalyzeConfig, options: DrawingModelOptions, model: "TensorAR", missing: list[str]
) -> "tuple[TrainingData | None, list[Batch]]":
    """The run's held-out images; if they cannot be had, adds the reason to `missing`.

    Raises:
        UserError: they are not in the data given as --data.
    """
    if config.held_out == 0:
        missing.append("loss and entropy of held-out images: --held-out 0")
        return None, []
    try:
        data = _run_data(config, options, model)
    except UserError as error:
        if config.data is not None:
            raise
        missing.append(f"loss and entropy of held-out images: {error}")
        return None, []
    data.validation = data.validation[: config.held_out]
    return data, [batch for batch, counted in data.validation_batches() if counted]


def _run_data(
    config: AnalyzeConfig, options: DrawingModelOptions, model: "TensorAR"
) -> "TrainingData":
    """The data of the run that wrote a checkpoint, with the run's own split.

    Raises:
        UserError: no run is known, or its data are missing or have changed since.
    """
    from t2i.training.batches import TrainingData
    from t2i.training.engine import start_processes

    run = _run_config(options)
    if config.data is not None:
        source = (config.data,) if isinstance(run.data.source, tuple) else config.data
        run = replace(run, data=replace(run.data, source=source))  # type: ignore[arg-type]
    processes = replace(start_processes(), device=model.backbone.device)
    data = TrainingData(replace(run, resume=False), model.backbone, processes)
    if data.key != _training(options)["data_key"]:
        raise UserError(
            f"the data set {run.data.source} has changed since the run (files were added, removed "
            "or edited), so it is not known which images were held out"
        )
    return data


def _training(options: DrawingModelOptions) -> dict:
    """The checkpoint's record of its run; UserError if no run wrote it."""
    from t2i.checkpoint_folders import read_config

    known = read_config(options.checkpoint)["training"] if options.checkpoint else {}
    if not isinstance(known.get("config"), dict) or "data_key" not in known:
        raise UserError(
            f"{options.source} is not the checkpoint of a run, so its training data are not known"
        )
    return known


def _run_config(options: DrawingModelOptions) -> "TrainConfig":
    from t2i.fields import from_json
    from t2i.training.config import TrainConfig

    where = f"{options.checkpoint}/config.json: training"
    known = {f.name for f in fields(TrainConfig)}  # reward fine-tuning has more
    stored = {k: v for k, v in _training(options)["config"].items() if k in known}
    return from_json(TrainConfig, stored, where)


# -- drawing ---------------------------------------------------------------------------------------
def _drawing(options: DrawingModelOptions, model: "TensorAR", who: str) -> DrawOptions:
    """How to draw with this model; UserError if it cannot be drawn so."""
    drawing = replace(options.drawing(model, among_others=True), stages=who == "model")
    if drawing.sampling is not None and drawing.sampling.renoise:
        raise UserError(_NO_RENOISE)
    return drawing


def _prompts(
    config: AnalyzeConfig,
    options: DrawingModelOptions,
    model: "TensorAR",
    data: "TrainingData | None",
) -> list[str | int]:
    """The given prompts, or those of held-out images, or those of the run's sample sheets."""
    from t2i.generation import parse_conditions
    from t2i.training.check import sheet_prompts
    from t2i.training.trigger_words import remind_of_trigger

    texts: Sequence[str] = _typed(config)
    remind_of_trigger(options.checkpoint, texts)
    if not texts and data is not None:
        return data.held_out_conditions(config.prompts)
    if not texts:
        try:
            texts = sheet_prompts(_run_config(options))
        except UserError:
            texts = ()
        if not texts:
            raise UserError("no prompts: give --prompt or --prompt-file")
    return parse_conditions(model.backbone, texts)


def _typed(config: AnalyzeConfig) -> list[str]:
    """The prompts given on the command line, if any."""
    from t2i.evaluation.prompt_files import read_prompts

    if not config.prompt and config.prompt_file is None:
        return []
    return [entry["prompt"] for entry in read_prompts(config.prompt, config.prompt_file)]


def _write_sheets(out: Path, drawn: "list[Drawn]") -> list[tuple[str, str]]:
    """Save a sheet of images for every stage; returns each file's path in `out` and its label."""
    from t2i.imaging import grid, save_png

    by_prompt = {one.prompt_index: one for one in reversed(drawn)}
    some = list(islice((by_prompt[p] for p in sorted(by_prompt)), _ON_SHEET))
    labels, sheets = [str(one.prompt) for one in some], []
    for stage, images in enumerate(zip(*(one.stages for one in some), strict=True), start=1):
        save_png(grid(images, columns=4, labels=labels), out / "sheets" / f"stage_{stage}.png")
        last = stage == len(some[0].stages)
        sheets.append((f"sheets/stage_{stage}.png", "final" if last else f"draft {stage}"))
    return sheets


def _course(options: "dict[str, DrawingModelOptions]", missing: list[str]) -> "list[Chart]":
    """Training curves of the model's run and of the control's run; metrics without a readable line
    are added to `missing`.
    """
    from t2i.training.config import METRICS
    from t2i.training.logs import read_metrics
    from t2i.training.run_page import metric_charts

    rows: dict[str, list[dict]] = {}
    for who, own in options.items():
        around = own.checkpoint.resolve().parents[:2] if own.checkpoint else ()
        run = next((folder for folder in around if (folder / METRICS).is_file()), None)
        rows[who] = [] if run is None else read_metrics(run)
        if run is not None and not rows[who]:
            missing.append(f"training curves of the {who}: no line of {run / METRICS} can be read")
    return metric_charts(rows["model"], rows.get("control", []))


if __name__ == "__main__":
    cli.run(main)

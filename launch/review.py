"""Compare models' images side by side: one page with prompts as rows and models as columns.

python launch/review.py --ckpt runs/mine --against shapes --prompt-file prompts.txt
# next to the base that it was trained from, with all refinement stages
python launch/review.py --ckpt runs/mine --with-base --prompt "a photo of two stars"
# images that already exist, with the verdicts of a benchmark
python launch/review.py --images outputs/geneval/base outputs/geneval/mine

The page needs no server. It offers zoom, refinement stages, which codes each stage changed, notes,
and blind votes that can be saved and loaded. Images that exist already are not drawn again.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli, launcher
from t2i.errors import UserError
from t2i.files import json_sha256
from t2i.model_options import BaseOptions, DrawingModelOptions
from t2i.ownership import owning, remove_leftovers
from t2i.sampling import check_counts

if TYPE_CHECKING:
    import torch

_MAIN = ("ckpt", "against", "with_base", "images", "names", "prompt", "prompt_file", "out")


@dataclass(frozen=True, kw_only=True)
class ReviewConfig(DrawingModelOptions):
    """Which models to compare, and on which prompts."""

    against: tuple[str, ...] = ()
    """Further models, each a column: checkpoint, run or export folders, or shapes, shapes-janus."""
    with_base: bool = False
    """Add a column for the base that --ckpt was trained from."""
    images: tuple[Path, ...] = ()
    """Further columns whose images already exist: folders in GenEval's layout, or outputs of
    geneval/run.py or dpg_bench/run.py, with their verdicts.
    """
    names: tuple[str, ...] = ()
    """Titles of the columns, in the order --ckpt, base, --against, --images."""
    prompt: tuple[str, ...] = ()
    """One or more prompts; those of the first --images folder if none are given."""
    prompt_file: Path | None = None
    """File with one prompt per line, or .jsonl with a "prompt" in every line."""
    samples: int = 4
    """Images per prompt."""
    stages: bool = True
    """Also draw every refinement stage of models that refine."""
    out: Path = Path("outputs/review")
    """Folder for the page and the images drawn for it."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(samples=self.samples)
        if self.with_base and self.ckpt is None:
            raise UserError(
                "--with-base adds the base of --ckpt, and no --ckpt is given: give both"
            )
        if self.source is None and not self.images and not self.against:
            raise UserError("nothing to show: give --ckpt, --against or --images")
        if self.source is None and not self.against:
            self.refuse_drawing(("prompt", "prompt_file", "samples", "stages"))

    def models(self) -> Iterator[DrawingModelOptions]:
        """The models that draw, in the order of the columns."""
        first = self.of_model()
        if self.source is not None:
            yield first
        if self.with_base:
            yield replace(first, ckpt=None, base=self._own_base(first))
        for name in self.against:
            yield replace(first, ckpt=name, base=BaseOptions())

    def _own_base(self, trained: DrawingModelOptions) -> BaseOptions:
        """The base that a checkpoint was trained from, as the checkpoint records it."""
        from t2i.checkpoint import stored_source
        from t2i.checkpoint_folders import is_checkpoint, read_config

        trained.check()
        if trained.checkpoint is None:
            raise UserError(
                f"{self.ckpt} is itself a base: --with-base needs a --ckpt that was trained from one"
            )
        source = stored_source(read_config(trained.checkpoint), trained.checkpoint)
        if self.base.weights is None and is_checkpoint(source.weights):
            raise UserError(
                f"the base of {self.ckpt} is the export {source.weights}, which is itself fine-tuned "
                "and does not contain its own base: leave out --with-base"
            )
        moved = {
            k: v for k in ("weights", "tokenizer", "text_encoder") if (v := getattr(self.base, k))
        }
        parts = {f.name: getattr(source, f.name) for f in fields(BaseOptions)}
        return BaseOptions(**parts | moved)


def main() -> None:
    config = cli.parse(ReviewConfig, __doc__, main=_MAIN)
    launcher.refuse_several()
    models = list(config.models())
    wheres = [model.check() for model in models]
    from t2i.evaluation.draw import check_prompts
    from t2i.evaluation.review_page import COLUMNS, DATA, check_columns, open_column, write_review
    from t2i.pages import refuse_other_page

    places = [config.out / COLUMNS / name for name in _place_names(models)]
    folders = [*places, *config.images]
    titles = config.names or [folder.name for folder in folders]
    if len(titles) != len(folders):
        raise UserError(f"{len(titles)} names for {len(folders)} columns: give one for each")
    columns = list(zip(titles, folders, strict=True))
    entries = _entries(config) if models else []
    # Columns that do not belong together are reported before anything is drawn.
    there = [open_column(*pair).prompts() for pair in columns[len(places) :]]
    check_columns(columns, [*[entries] * len(places), *there])
    refuse_other_page(config.out / "index.html", DATA)
    with owning(config.out, "review folder"):
        remove_leftovers(config.out)
        for place in places:
            check_prompts(place, entries, config.seed)
        for model, where, place in zip(models, wheres, places, strict=True):
            _draw(config, model, where, entries, place)
        opened = [open_column(*pair) for pair in columns]
        page = write_review(config.out, opened, title=config.out.resolve().name)
    print(f"look at {page}")


def _place_names(models: Sequence[DrawingModelOptions]) -> list[str]:
    """A folder name for each model: its name, plus digits of its path's hash if others share it."""
    names = [model.name() for model in models]
    own = [json_sha256(str(model.checkpoint or model.source))[:6] for model in models]
    return [
        name if names.count(name) == 1 else f"{name}-{digits}"
        for name, digits in zip(names, own, strict=True)
    ]


def _entries(config: ReviewConfig) -> list[dict]:
    """The given prompts, or else those of the first images folder."""
    from t2i.evaluation.prompt_files import read_prompts
    from t2i.evaluation.review_page import open_column

    if config.prompt or config.prompt_file or not config.images:
        return read_prompts(config.prompt, config.prompt_file)
    return open_column("", config.images[0]).prompts()


def _draw(
    config: ReviewConfig,
    model_options: DrawingModelOptions,
    where: "tuple[torch.device, torch.dtype]",
    entries: list[dict],
    place: Path,
) -> None:
    """Draw the images that a column still lacks."""
    from t2i.evaluation import draw
    from t2i.generation import all_jobs, unpadded
    from t2i.training.trigger_words import remind_of_trigger

    print(f"{place.name}:", file=sys.stderr)
    remind_of_trigger(model_options.checkpoint, [entry["prompt"] for entry in entries])
    model = model_options.load(*where)
    jobs = all_jobs(range(len(entries)), config.samples)
    stages = config.stages and model.windows.stages > 1
    options = replace(model_options.drawing(model, among_others=True), stages=stages)
    request = draw.PromptRequest(model, entries, unpadded(model, options, len(jobs)))
    draw.draw_prompts(request, jobs, place)


if __name__ == "__main__":
    cli.run(main)

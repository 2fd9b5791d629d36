"""DPG-Bench: draw a model's images and judge them, judge a folder of images, or compare two
results.

python dpg_bench/run.py --ckpt runs/mine --out outputs/dpg_bench/mine
python dpg_bench/run.py --ckpt shapes --out outputs/dpg_bench/base     # the shipped base model
python dpg_bench/run.py --images grids --resolution 512
python dpg_bench/run.py compare outputs/dpg_bench/base outputs/dpg_bench/mine
torchrun --nproc_per_node 8 dpg_bench/run.py --ckpt runs/mine
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.evaluation_options import BenchmarkOptions, CompareOptions, parse
from t2i.sampling import check_counts


@dataclass(frozen=True, kw_only=True)
class DPGOptions(BenchmarkOptions):
    """What to judge, and which judge to use."""

    images: Path | None = None
    """Judge this folder of images instead of a model: 2 x 2 grids (with --resolution), single
    images (ITEM_0.png ...), or GenEval's layout (00000/samples/00000.png ...).
    """
    questions: str = "auto"
    """official (downloaded once), shapes (the shapes world's), a .csv file, or auto (shapes for a
    shapes model, otherwise official).
    """
    judge: Literal["auto", "mplug", "shapes", "blip-vqa", "vlm"] = "auto"
    """mplug (the official judge), shapes (exact), blip-vqa, vlm, or auto (shapes for the shapes
    world's questions, or for a shapes model unless the questions are official; otherwise mplug).
    """
    judge_weights: str | None = None
    """Folder or hub id of the judge's weights; the judge's default weights if not given."""
    resolution: int | None = None
    """Side in pixels of one image in a 2 x 2 grid, if --images holds grids named ITEM.png; if not
    given, ITEM.png is a single image.
    """

    def __post_init__(self):
        super().__post_init__()
        check_counts(resolution=self.resolution)
        if self.resolution is not None and self.images is None:
            raise UserError("--resolution is only for grids in --images: leave it out")


def main() -> None:
    options = parse(DPGOptions, __doc__, main=("questions", "judge", "resolution"))
    from dpg_bench.answerers import load_answerer
    from dpg_bench.dpg_benchmark import DPGBench, by_prompt, load_questions, prompt_entries
    from dpg_bench.image_files import arrange
    from t2i.evaluation import results, runner

    if isinstance(options, CompareOptions):
        print(results.compare_folders(options.a, options.b, by_prompt, mean_of_groups=False))
        return
    where = options.check()
    questions, judge = options.questions, options.judge
    if questions == "auto":
        questions = "shapes" if runner.is_shapes_world(options) else "official"
    if judge == "auto":
        own = questions != "official" and runner.is_shapes_world(options)
        judge = "shapes" if own or questions == "shapes" else "mplug"
    graph = load_questions(questions)
    entries = prompt_entries(graph)

    def build(processes) -> DPGBench:
        answerer = load_answerer(judge, options.judge_weights, processes.device)
        return DPGBench(graph, answerer, questions=questions)

    def prepare(out: Path, processes) -> Callable[[], Path]:
        assert options.images is not None
        return arrange(
            options.images,
            entries,
            out,
            scope=options.scope,
            resolution=options.resolution,
            processes=processes,
        )

    runner.run(options, where, "dpg_bench", entries, build, prepare)


if __name__ == "__main__":
    cli.run(main)

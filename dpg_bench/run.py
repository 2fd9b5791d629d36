"""DPG-Bench: draw a model's images and judge them, judge a folder of images, or compare two
results.

python dpg_bench/run.py --ckpt runs/mine --out outputs/dpg_bench/mine
python dpg_bench/run.py --ckpt shapes --out outputs/dpg_bench/base     # the shipped base by itself
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
    """What to judge, and by whom."""

    questions: str = "auto"
    """official (downloaded once), shapes (its own), a .csv file, or auto (by the model)."""
    judge: Literal["auto", "mplug", "shapes", "blip-vqa", "vlm"] = "auto"
    """mplug (the official one), shapes (exact), blip-vqa, vlm, or auto (by questions and model)."""
    judge_weights: str | None = None
    """Folder or hub id of the judge's weights, if not its usual ones."""
    resolution: int | None = None
    """--images holds 2 x 2 grids ITEM.png of images of so many pixels a side (without: ITEM.png or
    ITEM_0.png ... are images).
    """

    def __post_init__(self):
        super().__post_init__()
        check_counts(resolution=self.resolution)
        if self.resolution is not None and self.images is None:
            raise UserError("--resolution is of the grids in --images: leave it out")


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
    questions, who = options.questions, options.judge
    if questions == "auto":
        questions = "shapes" if runner.is_shapes_world(options) else "official"
    if who == "auto":
        own = questions != "official" and runner.is_shapes_world(options)
        who = "shapes" if own or questions == "shapes" else "mplug"
    graph = load_questions(questions)
    entries = prompt_entries(graph)

    def build(processes) -> DPGBench:
        answerer = load_answerer(who, options.judge_weights, processes.device)
        return DPGBench(graph, answerer, questions=questions)

    def to_layout(out: Path, processes) -> Callable[[], Path]:
        assert options.images is not None
        return arrange(
            options.images,
            entries,
            out,
            scope=options.scope,
            resolution=options.resolution,
            processes=processes,
        )

    runner.run(options, where, "dpg_bench", entries, build, to_layout)


if __name__ == "__main__":
    cli.run(main)

"""GenEval: draw a model's images and judge them, judge a folder of images, or compare two results.

python geneval/run.py --ckpt runs/mine
python geneval/run.py --ckpt shapes                                    # the shipped base by itself
python geneval/run.py --images any_models_images
python geneval/run.py compare outputs/geneval/base outputs/geneval/mine
torchrun --nproc_per_node 8 geneval/run.py --ckpt runs/mine
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.evaluation.options import BenchmarkOptions, CompareOptions, dispatch


@dataclass(frozen=True, kw_only=True)
class GenEvalOptions(BenchmarkOptions):
    """What to judge, and by whom."""

    prompts: str = "auto"
    """official (553), shapes (the shapes world's 120), a .jsonl file of GenEval metadata, or auto
    (by the model).
    """
    detector: Literal["auto", "mask2former", "mask2former-hf", "shapes"] = "auto"
    """mask2former (the official one), mask2former-hf (an approximation), shapes, or auto (by the
    prompts).
    """
    detector_weights: Path | None = None
    """Weights of the detector, if they are not to be downloaded."""
    detector_sha256: str | None = None
    """First digits of the hash that these weights must have instead of the published one."""


def main() -> None:
    dispatch(GenEvalOptions, __doc__, judge, compare, main=("prompts", "detector"))


def compare(options: CompareOptions) -> None:
    """Print the differences of two finished runs."""
    from geneval.summary import by_prompt
    from t2i.evaluation.compare import compare_folders

    print(compare_folders(options.a, options.b, by_prompt))


def judge(options: GenEvalOptions) -> None:
    """Draw if need be, judge, and report."""
    from geneval.detectors import load_detector
    from geneval.geneval_benchmark import GenEval, load_prompts
    from t2i.evaluation import evaluator_program as program

    options.check()
    prompts, detector = options.prompts, options.detector
    if prompts == "auto":
        prompts = "shapes" if program.is_shapes_world(options) else "official"
    if detector == "auto":
        detector = "shapes" if prompts == "shapes" else "mask2former"
    entries = load_prompts(prompts)

    def build(processes) -> GenEval:
        eyes = load_detector(
            detector,
            weights=options.detector_weights,
            sha256=options.detector_sha256,
            device=str(processes.device),
        )
        return GenEval(entries, eyes, prompts=prompts)

    program.run(options, "geneval", entries, build)


if __name__ == "__main__":
    cli.run(main)

"""GenEval: draw a model's images and judge them, judge a folder of images, or compare two results.

python geneval/run.py --ckpt runs/mine --out outputs/geneval/mine
python geneval/run.py --ckpt shapes --out outputs/geneval/base   # the shipped base, not fine-tuned
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
from t2i.evaluation.evaluation_options import BenchmarkOptions, CompareOptions, parse


@dataclass(frozen=True, kw_only=True)
class GenEvalOptions(BenchmarkOptions):
    """What to judge, and with which detector."""

    prompts: str = "auto"
    """official (553 prompts), shapes (120), a .jsonl file of GenEval metadata, or auto: shapes for
    a shapes-world model, else official.
    """
    detector: Literal["auto", "mask2former", "mask2former-hf", "shapes"] = "auto"
    """mask2former (official), mask2former-hf (another training run, close to official), shapes
    (exact, only for shapes-world images), or auto: shapes for the shapes prompts, or for a shapes
    model unless the prompts are official; otherwise mask2former.
    """
    detector_weights: Path | None = None
    """The detector's weights, as a file or the folder that holds it; the cache or a download if not
    given.
    """
    detector_sha256: str | None = None
    """First digits (at least 8) of the SHA-256 that the mask2former file given as
    --detector-weights must have instead of the published one; the result is marked as not official.
    """


def main() -> None:
    options = parse(GenEvalOptions, __doc__, main=("prompts", "detector"))
    from geneval.detectors import load_detector
    from geneval.geneval_benchmark import GenEval, load_prompts
    from geneval.summary import by_prompt
    from t2i.evaluation import results, runner

    if isinstance(options, CompareOptions):
        print(results.compare_folders(options.a, options.b, by_prompt))
        return
    where = options.check()
    prompts, detector = options.prompts, options.detector
    if prompts == "auto":
        prompts = "shapes" if runner.is_shapes_world(options) else "official"
    if detector == "auto":
        own = prompts != "official" and runner.is_shapes_world(options)
        detector = "shapes" if own or prompts == "shapes" else "mask2former"
    entries = load_prompts(prompts)

    def build(processes) -> GenEval:
        weights, sha256 = options.detector_weights, options.detector_sha256
        judge = load_detector(detector, weights=weights, sha256=sha256, device=processes.device)
        return GenEval(entries, judge, prompts=prompts)

    runner.run(options, where, "geneval", entries, build)


if __name__ == "__main__":
    cli.run(main)

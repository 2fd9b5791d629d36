"""GenEval: draw a model's images and judge them, judge a folder of images, or compare two results.

python geneval/run.py --ckpt runs/mine --out outputs/geneval/mine
python geneval/run.py --ckpt shapes --out outputs/geneval/base         # the shipped base by itself
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
    """What to judge, and by whom."""

    prompts: str = "auto"
    """official (553), shapes (120), a .jsonl file of GenEval metadata, or auto (by the model)."""
    detector: Literal["auto", "mask2former", "mask2former-hf", "shapes"] = "auto"
    """mask2former (official), mask2former-hf (nearly), shapes (exact), or auto (by the prompts)."""
    detector_weights: Path | None = None
    """File or folder with the detector's weights (default: the cache, else a download)."""
    detector_sha256: str | None = None
    """First digits of the hash that these weights must have instead of the published one."""


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
        detector = "shapes" if prompts == "shapes" else "mask2former"
    entries = load_prompts(prompts)

    def build(processes) -> GenEval:
        weights, sha256 = options.detector_weights, options.detector_sha256
        eyes = load_detector(detector, weights=weights, sha256=sha256, device=processes.device)
        return GenEval(entries, eyes, prompts=prompts)

    runner.run(options, where, "geneval", entries, build)


if __name__ == "__main__":
    cli.run(main)

"""GenEval (arXiv 2310.11513) as a library: detector, judge, summary.

`score(images, metadata)` does it all for images in memory, as a reward does; `geneval.benchmark.GenEval` is the whole benchmark
with files and pages, for `t2i.evaluation.runner.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from geneval.detector import Detections, Detector
from geneval.judge import JudgeOptions, Verdict, judge, judge_image
from geneval.summary import Summary, TagScore, format_summary, result_row, summarize
from t2i.errors import UserError

__all__ = [
    "Detections",
    "Detector",
    "JudgeOptions",
    "Report",
    "Summary",
    "TagScore",
    "Verdict",
    "format_summary",
    "judge",
    "judge_image",
    "result_row",
    "score",
    "summarize",
]


@dataclass(frozen=True)
class Report:
    """One verdict per image, in the order of the images, and their summary."""

    verdicts: list[Verdict]
    summary: Summary


def score(
    images: Sequence[Image.Image],
    metadata: Sequence[Mapping],
    detector: Detector | None = None,
    *,
    options: JudgeOptions | None = None,
    seed: int = 0,
) -> Report:
    """Judge images in memory and summarise.

    images: RGB, prompt by prompt: the same number of images for each entry of `metadata` (GenEval
    schema: tag, prompt, include, exclude), in its order. detector: Mask2Former with CLIP, loaded once
    and on a GPU where there is one, if None. seed: of the bootstrap standard errors.

    Raises UserError when the numbers do not fit, or when the detector cannot name a class or
    colour that the metadata asks for.
    """
    if not metadata or not images or len(images) % len(metadata):
        raise UserError(
            f"{len(images)} images for {len(metadata)} prompts: "
            "give the same number of images, at least one, for every prompt"
        )
    detector = detector or _default_detector()
    each = len(images) // len(metadata)
    entries = [entry for entry in metadata for _ in range(each)]
    verdicts = [
        judge_image(image, entry, detector, options)
        for image, entry in zip(images, entries, strict=True)
    ]
    rows = [
        result_row(f"{index // each:05d}/samples/{index % each:05d}.png", entry, verdict)
        for index, (entry, verdict) in enumerate(zip(entries, verdicts, strict=True))
    ]
    return Report(verdicts, summarize(rows, seed=seed))


@lru_cache(maxsize=1)
def _default_detector() -> Detector:
    import torch

    from geneval.detectors import load_detector

    return load_detector("mask2former", device="cuda" if torch.cuda.is_available() else "cpu")

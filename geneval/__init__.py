"""GenEval (arXiv 2310.11513) as a library: detector, judge, summary.

`score(images, metadata, detector)` does it all for images in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from geneval.detector import Detections, Detector
from geneval.judge import JudgeOptions, Verdict, judge, judge_image
from geneval.summary import Summary, TagScore, format_summary, result_row, summarize

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
    detector: Detector,
    *,
    options: JudgeOptions | None = None,
    seed: int = 0,
) -> Report:
    """Judge images in memory and summarise.

    images: RGB, prompt by prompt: the same number of images for each entry of `metadata` (GenEval
    schema: tag, prompt, include, exclude), in its order. seed: of the bootstrap standard errors.

    Raises ValueError when the numbers do not fit, or when the detector cannot name a class or
    colour that the metadata asks for.
    """
    if not metadata or not images or len(images) % len(metadata):
        raise ValueError(
            f"{len(images)} images for {len(metadata)} prompts: "
            "give the same number of images, at least one, for every prompt"
        )
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

"""GenEval (arXiv 2310.11513) as a library: detector, rules, summary.

`score(images, metadata)` judges images in memory, for example for a reward.
`geneval.geneval_benchmark.GenEval` is the whole benchmark, with its files and report pages, for
`t2i.evaluation.runner.evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geneval.detector import Detections, Detector
from geneval.prompts import official_prompts
from geneval.rules import (
    RuleOptions,
    Verdict,
    check_schema,
    checked_options,
    decide,
    judge_image,
    warn_of_doubts,
)
from geneval.summary import Summary, TagScore, format_summary, result_row, summarize
from t2i.errors import UserError
from t2i.evaluation.generation_folder import load_image
from t2i.imaging import upright_rgb
from t2i.sampling import check_seed
from t2i.worlds import open_world

__all__ = [
    "Detections",
    "Detector",
    "Judgement",
    "RuleOptions",
    "Summary",
    "TagScore",
    "Verdict",
    "decide",
    "format_summary",
    "judge_image",
    "result_row",
    "score",
    "summarize",
]


@dataclass(frozen=True)
class Judgement:
    """One verdict per image, in the order of the images, and their summary."""

    verdicts: list[Verdict]
    summary: Summary

    def _repr_markdown_(self) -> str:
        """In a notebook: the summary."""
        return self.summary._repr_markdown_()


def score(
    images: Sequence[Image.Image | np.ndarray | str | Path],
    metadata: Sequence[Mapping | str],
    detector: Detector | None = None,
    *,
    options: RuleOptions | None = None,
    seed: int = 0,
) -> Judgement:
    """Judge images and summarize the verdicts.

    images: PIL images, uint8 arrays [H, W, 3] (or [H, W]) or file paths, grouped by prompt in the
    order of `metadata`, with the same number of images for every prompt.
    metadata: one entry per prompt: either a mapping in GenEval's schema (tag, prompt, include,
    exclude), or the text of a prompt from GenEval's 553 or from the shapes world.
    detector: default Mask2Former with CLIP, loaded once, on a GPU if there is one.
    options: thresholds of GenEval's rules; default GenEval's own.
    seed: for the bootstrap standard errors.

    Raises UserError if an argument has the wrong type, if the number of images is not a multiple of
    the number of prompts, or if the detector does not know a class or color in the metadata.
    """
    asked: list[Any] = _listed(metadata, "metadata", single=isinstance(metadata, str | Mapping))
    single = isinstance(images, Image.Image | str | Path) or getattr(images, "ndim", 4) < 4
    given: list[Any] = _listed(images, "images", single=single)
    options = checked_options(options)
    check_seed(seed)
    if not asked or not given or len(given) % len(asked):
        raise UserError(
            f"{len(given)} images for {len(asked)} prompts: "
            "give the same number of images, at least one, for every prompt"
        )
    each = len(given) // len(asked)
    prompts = [_entry(one, place) for place, one in enumerate(asked)]
    warn_of_doubts(prompts)
    entries = [entry for entry in prompts for _ in range(each)]
    pictures = [_picture(one, place) for place, one in enumerate(given)]
    detector = detector or _default_detector()
    verdicts = [
        judge_image(image, entry, detector, options)
        for image, entry in zip(pictures, entries, strict=True)
    ]
    rows = [
        result_row(f"{index // each:05d}/samples/{index % each:05d}.png", entry, verdict)
        for index, (entry, verdict) in enumerate(zip(entries, verdicts, strict=True))
    ]
    return Judgement(verdicts, summarize(rows, seed=seed))


def _listed(given: Any, name: str, *, single: bool) -> list[Any]:
    """`given` as a list, wrapped if it is a `single` item; UserError if it is not iterable."""
    if not single and not isinstance(given, Iterable):
        raise UserError(f"{name} is {given!r:.80}: give a list or a single item")
    return [given] if single else list(given)


def _entry(given: Mapping | str, place: int) -> Mapping:
    """Metadata, checked if given as a mapping, looked up if given as a prompt's text."""
    if isinstance(given, str):
        if given in (known := _known_prompts()):
            return known[given]
        raise UserError(
            f"score cannot know what {given!r:.200} asks for: it is a prompt of neither GenEval nor the "
            "shapes world. Give its metadata instead, such as "
            '{"tag": "colors", "prompt": "a photo of a red bus", "include": [{"class": "bus", "count": 1, "color": "red"}]}'
        )
    return check_schema(given, f"metadata[{place}]")


@lru_cache(maxsize=1)
def _known_prompts() -> dict[str, dict]:
    shapes = open_world("shapes").every_prompt()
    return {entry["prompt"]: entry for entry in (*shapes, *official_prompts())}


def _picture(given: Image.Image | np.ndarray | str | Path, place: int) -> Image.Image:
    try:
        if isinstance(given, Image.Image):
            return upright_rgb(given)
        if isinstance(given, str | Path):
            return load_image(Path(given))
        if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim in (2, 3):
            return Image.fromarray(given).convert("RGB")
    except (UserError, OSError, TypeError, ValueError) as error:
        raise UserError(f"images[{place}] cannot be read as an image: {error}") from error
    kind = f"{given!r:.80}"
    if isinstance(given, np.ndarray):
        kind = f"an array of {given.dtype}, {list(given.shape)}"
    raise UserError(
        f"images[{place}] is {kind}: score takes PIL images, files, and uint8 arrays [H, W, 3] or "
        "[H, W]"
    )


@lru_cache(maxsize=1)
def _default_detector() -> Detector:
    # Imported here so that the rules and the summary can be used without PyTorch.
    import torch

    from geneval.detectors import load_detector

    return load_detector("mask2former", device="cuda" if torch.cuda.is_available() else "cpu")

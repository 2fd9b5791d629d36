"""GenEval as a benchmark for `t2i.evaluation.runner`: prompts, verdicts, scores, gallery cards.

evaluate(GenEval(metadata, detector), out, model=model)
evaluate(GenEval(metadata, detector), out, images=folder)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from geneval.detector import Detections, Detector
from geneval.prompts import official_prompts
from geneval.rules import RuleOptions, Verdict, check_entries, check_schema, judge_detected
from geneval.summary import by_prompt, result_row, summarize
from t2i import __version__
from t2i.charts import TINTS
from t2i.errors import UserError, nearest_path
from t2i.evaluation.bootstrap import mean_over_prompts
from t2i.evaluation.gallery import Box, Card
from t2i.evaluation.judging import Judged
from t2i.evaluation.prompt_files import read_prompts
from t2i.evaluation.results import Score
from t2i.sources import check_place
from t2i.worlds import WORLDS, open_world

_NOT_TASKS = ("overall", "correct images", "correct prompts")
"""The names of the scores of all tasks, which no task may have."""


class GenEval:
    """GenEval's rules with given prompts and a detector; see `t2i.evaluation.runner.Benchmark`."""

    name = "GenEval"
    best = 1.0
    decimals = 3
    legend = (
        "overall: the unweighted mean of the tasks' rates of correct images; "
        "a prompt is correct if any of its images is; entries that are equal are one prompt."
    )

    def __init__(
        self,
        entries: Sequence[dict],
        detector: Detector,
        *,
        options: RuleOptions | None = None,
        prompts: str = "own",
    ):
        """entries: GenEval metadata in the order of the folder numbers.
        prompts: the name of this set of prompts, for the report.

        Raises:
            UserError: an entry is not in GenEval's schema, has the name of a score as its tag, or
                contains a class or color that the detector does not know.
        """
        check_entries(entries, detector)
        for index, entry in enumerate(entries):
            if entry["tag"] in _NOT_TASKS:
                raise UserError(
                    f"prompt {index} has the tag {entry['tag']!r}, which is the name of a score of "
                    "all tasks: give it another tag"
                )
        self.entries = entries
        self.detector = detector
        self.options = options or RuleOptions()
        judge = detector.identity()
        mark = "" if judge["official"] else " (not the official judge)"
        self.label = f"{prompts} prompts, judged by {judge['name']}{mark}"

    def identity(self) -> dict:
        """The detector with its weights, the thresholds and the library versions."""
        detector = dict(self.detector.identity())
        versions = {"t2i": __version__, **detector.pop("libraries")}
        return {"detector": detector, "options": asdict(self.options), "versions": versions}

    def judge(self, prompt_index: int, image: Image.Image, filename: str) -> Judged:
        """The verdict on an image; for a failure also the masks of the detections."""
        entry = self.entries[prompt_index]
        detections = self.detector.detect(image)
        verdict = judge_detected(image, entry, self.detector, detections, self.options)
        overlay = None if verdict.correct else draw_masks(image.size, detections, verdict)
        return Judged(result_row(filename, entry, verdict), overlay)

    def scores(self, rows: Sequence[dict]) -> list[Score]:
        """Overall, by task, and the rates of correct images and of correct prompts."""
        summary = summarize(rows)
        images, prompts = summary.total_images, summary.total_prompts
        found = summary.scores()
        correct = [values for group in by_prompt(rows).values() for values in group.values()]
        rates = {"correct images": correct, "correct prompts": [[any(v)] for v in correct]}
        for name, values in rates.items():
            rate, _ = mean_over_prompts(values)
            found.append(Score(name, rate.mean, rate.stderr, images, prompts))
        return found

    def card(self, row: dict) -> Card | None:
        """A card for a failure: its reasons, and boxes in the colors of `draw_masks`."""
        if row["correct"]:
            return None
        boxes = [
            Box(f"{name} {score:.2f}", tuple(corners), tint)
            for tint, (name, found) in enumerate(json.loads(row["details"]).items())
            for *corners, score in found
        ]
        return Card(row["tag"], row["prompt"], row["reason"].split("\n"), boxes)


def load_prompts(name: str) -> list[dict]:
    """The entries of "official" (553), of "shapes" (the shapes world's 120), or of a metadata file.

    Raises:
        UserError: the file does not exist, cannot be read, or does not hold GenEval metadata.
    """
    check_place(name, "name")
    if name == "official":
        return official_prompts()
    if name in WORLDS:
        return open_world(name).benchmark_prompts()
    if not Path(name).exists():
        known = ", ".join(("official", *WORLDS))
        text = f"there are no prompts {name!r}: give {known} or a .jsonl file{nearest_path(name)}"
        raise UserError(text)
    entries = read_prompts((), Path(name))
    for index, entry in enumerate(entries):
        check_schema(entry, f"{name}: prompt {index}")
    return entries


def draw_masks(
    size: tuple[int, int], detections: Mapping[str, Detections], verdict: Verdict
) -> Image.Image | None:
    """Draw the masks of the detections that the verdict rests on, the most confident on top.

    Each class has its own color. Masks are hatched rather than filled, because a fill would change
    the colors that the verdict may be about.

    Returns:
        A palette image of `size` (width, height) with a transparent background; None if there are
        no masks.
    """
    layers = [
        (detections[name].scores[i], 1 + tint % len(TINTS), masks[i])
        for tint, (name, indices) in enumerate(verdict.kept.items())
        if (masks := detections[name].masks) is not None
        for i in indices
    ]
    if not layers:
        return None
    label_HW = np.zeros(size[::-1], dtype=np.uint8)
    for _, label, mask_HW in sorted(layers, key=lambda layer: layer[0]):
        label_HW[mask_HW] = label
    period = max(4, min(size) // 32)
    label_HW[np.add(*np.ogrid[: size[1], : size[0]]) % period >= max(1, period // 4)] = 0
    overlay = Image.fromarray(label_HW).convert("P")
    overlay.putpalette([0, 0, 0, *(c for tint in TINTS for c in ImageColor.getrgb(tint))])
    overlay.info["transparency"] = 0
    return overlay

"""GenEval's scores and their standard errors, computed from verdicts.

Reference: `evaluation/summary_scores.py` of djghosh13/geneval. A task's score is the mean over its
images; the overall score is the unweighted mean of the task scores, not the mean over images.
A prompt is correct if any of its images is; images with equal `metadata` strings belong to the same
prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from geneval.rules import Verdict
from t2i.errors import UserError
from t2i.evaluation.bootstrap import mean_over_prompts
from t2i.evaluation.results import Score, notebook_table
from t2i.sampling import check_seed


@dataclass(frozen=True)
class TagScore:
    """The score of one task (`mean`), with its bootstrap standard error and its counts.

    correct, total: numbers of images. prompts: number of prompts. stderr: None if there is only one
    prompt.
    """

    correct: int
    total: int
    prompts: int
    mean: float
    stderr: float | None


@dataclass(frozen=True)
class Summary:
    """GenEval's scores, in 0..1; `tags` (tasks) are in order of first appearance."""

    overall: float
    overall_stderr: float | None
    tags: dict[str, TagScore]
    total_images: int
    correct_images: int
    total_prompts: int
    prompts_with_any_correct: int

    def scores(self) -> list[Score]:
        """The overall score, then one for each task."""
        images, prompts = self.total_images, self.total_prompts
        numbers = (self.overall, self.overall_stderr, images, prompts)
        tasks = [
            Score(name, tag.mean, tag.stderr, tag.total, tag.prompts)
            for name, tag in self.tags.items()
        ]
        return [Score("overall", *numbers, headline=True), *tasks]

    def _repr_markdown_(self) -> str:
        """In a notebook: a table of the scores."""
        return notebook_table(self.scores(), "GenEval", 3)

    @property
    def fraction_correct_images(self) -> float:
        return self.correct_images / self.total_images

    @property
    def fraction_correct_prompts(self) -> float:
        return self.prompts_with_any_correct / self.total_prompts


def result_row(filename: str, metadata: Mapping, verdict: Verdict) -> dict:
    """A line of the official results file; its metadata and details are JSON strings.

    Raises UserError if an argument is of the wrong type.
    """
    if not isinstance(metadata, Mapping) or not {"tag", "prompt"} <= metadata.keys():
        raise UserError(
            f"metadata is {metadata!r:.80}: give the prompt's entry, with tag and prompt"
        )
    if not isinstance(verdict, Verdict):
        raise UserError(f"verdict is {verdict!r:.80}: give one of judge_image's or decide's")
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(verdict.details),
    }


def by_prompt(rows: Iterable[Mapping]) -> dict[str, dict[str, list[bool]]]:
    """Tag -> prompt (its metadata string) -> whether each of its images is correct."""
    by_tag: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        prompts = by_tag.setdefault(row["tag"], {})
        prompts.setdefault(row["metadata"], []).append(bool(row["correct"]))
    return by_tag


def summarize(rows: Iterable[Mapping], seed: int = 0) -> Summary:
    """Summarize result rows: one per image, in any order, with tag, correct and metadata.

    The standard errors come from resampling prompts within each tag. They depend on `seed` and on
    the set of rows, not on their order.

    Raises UserError if there are no rows, or if something else is given.
    """
    check_seed(seed)
    by_tag = by_prompt(_result_rows(rows))
    if not by_tag:
        raise UserError("no verdicts to summarize: judge at least one image first")
    tags: dict[str, TagScore] = {}
    for tag, prompts in by_tag.items():
        images = [prompts[key] for key in sorted(prompts)]
        found, _ = mean_over_prompts(images, tag, seed=seed)
        counts = (int(found.total), found.count, found.prompts)
        tags[tag] = TagScore(*counts, found.mean, found.stderr)
    # Tags are resampled independently: the variance of their mean is the sum of their variances
    # over n^2. Sorting makes the sum's rounding independent of the order of the rows.
    stderrs = sorted(score.stderr for score in tags.values() if score.stderr is not None)
    overall_stderr = math.hypot(*stderrs) / len(tags) if len(stderrs) == len(tags) else None
    return Summary(
        overall=math.fsum(score.mean for score in tags.values()) / len(tags),
        overall_stderr=overall_stderr,
        tags=tags,
        total_images=sum(score.total for score in tags.values()),
        correct_images=sum(score.correct for score in tags.values()),
        total_prompts=sum(score.prompts for score in tags.values()),
        prompts_with_any_correct=sum(any(i) for p in by_tag.values() for i in p.values()),
    )


def _result_rows(given: object) -> list[Mapping]:
    """The rows as a list; UserError if they are something else."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise UserError(
            f"rows is {given!r:.80}: give a list of rows, as geneval.result_row makes them"
        )
    rows = list(given)
    for row in rows:
        if not isinstance(row, Mapping) or not {"tag", "metadata", "correct"} <= row.keys():
            raise UserError(
                f"{row!r:.80} is no result row: geneval.result_row makes one of a verdict"
            )
    return rows


def format_summary(summary: Summary) -> str:
    """The text that the official script prints, character for character, without final newline.

    Raises UserError if `summary` is none.
    """
    if not isinstance(summary, Summary):
        raise UserError(f"summary is {summary!r:.80}: give what geneval.summarize returns")
    lines = [
        "Summary",
        "=======",
        f"Total images: {summary.total_images}",
        f"Total prompts: {summary.total_prompts}",
        f"% correct images: {summary.fraction_correct_images:.2%}",
        f"% correct prompts: {summary.fraction_correct_prompts:.2%}",
        "",
        "Task breakdown",
        "==============",
    ]
    for tag, score in summary.tags.items():
        lines.append(f"{tag:<16} = {score.mean:.2%} ({score.correct} / {score.total})")
    return "\n".join([*lines, "", f"Overall score (avg. over tasks): {summary.overall:.5f}"])

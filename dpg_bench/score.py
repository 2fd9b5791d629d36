"""DPG-Bench's scores: those that the official script prints, and corrected ones without its errors.

Reference: `dpg_bench/compute_dpg_bench.py` of TencentQQGYLab/ELLA at 3c228f1 (arXiv 2403.05135). A
question scores 1 if the answer is exactly "yes", otherwise 0. Then, row by row, a question whose
parent has a score of 0 at that point scores 0 as well. An image's score is the mean over its
questions, a prompt's the mean over its images, the benchmark's the mean over prompts, times 100.
Categories average the answers as they were before parents were considered.

`official` repeats three errors of that script (a fourth, mixing up categories between processes,
only affects its printed tables):
- it drops the first row of the CSV, and skips a prompt without other rows or with a child of it;
- it averages a category over the last image of each prompt only;
- images that cannot be judged are left out of the mean.
`corrected` counts every question of every image; missing images are listed in `BothWays.missing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpg_bench.questions import Question, QuestionGraph, group_by_item
from t2i.errors import UserError
from t2i.evaluation.bootstrap import mean_over_prompts
from t2i.evaluation.results import Score, notebook_table, score_table

YES = "yes"
OFFICIAL, CORRECTED = "official", "corrected"
OVERALL = "overall"
IMAGES_PER_PROMPT = 4
LEGEND = (
    "official: as the official script counts (first row dropped, categories over the last image of "
    'each prompt); corrected: all questions of all images. Categories are rates of "yes" before '
    "dependencies."
)

Answers = Mapping[str, str]
"""The answers for one image: proposition id (as text, for JSON) -> answer."""


@dataclass(frozen=True)
class Mean:
    """A mean in 0..100 (None if there are no values) and its bootstrap standard error (None for
    fewer than two prompts).

    n: number of values averaged (prompts for the overall score, answers for a category); images,
    prompts: how many they come from.
    """

    mean: float | None
    stderr: float | None
    n: int
    images: int
    prompts: int


@dataclass(frozen=True)
class PromptScore:
    """Scores in 0..1 of a prompt and of each image; raw: each image's answers as 0 or 1."""

    score: float
    per_image: list[float]
    raw: list[dict[int, float]]


@dataclass(frozen=True)
class Tally:
    """The scores of one way to count. l1, l2: categories by name. skipped: item id -> reason."""

    overall: Mean
    l1: dict[str, Mean]
    l2: dict[str, Mean]
    prompts: dict[str, PromptScore]
    skipped: dict[str, str]


@dataclass(frozen=True)
class BothWays:
    """Both ways to count. missing: incomplete prompts, as "item" or "item: 3 of 4 images"."""

    official: Tally
    corrected: Tally
    missing: list[str]

    def _repr_markdown_(self) -> str:
        """The table that a notebook shows."""
        return notebook_table(list_scores(self), "DPG-Bench", 2)


class MissingParentError(LookupError):
    """A question depends on a row that is missing."""


def score_image(questions: Sequence[Question], answers: Answers) -> tuple[float, dict[int, float]]:
    """One image's score (0..1), and its answers as 1 or 0 before parents are considered.

    Raises:
        MissingParentError: a question's parent is not among `questions`.
    """
    raw, scores = score_questions(questions, answers)
    return sum(scores.values()) / len(scores), raw


def score_questions(
    questions: Sequence[Question], answers: Answers
) -> tuple[dict[int, float], dict[int, float]]:
    """Proposition -> 1 or 0, before and after parents are considered; raises as `score_image`."""
    raw = {q.proposition: float(answers[str(q.proposition)] == YES) for q in questions}
    scores = dict(raw)
    for question in questions:
        for parent in question.parents:
            if parent not in scores:
                raise MissingParentError(
                    f"proposition {question.proposition} depends on {parent}, which is dropped"
                )
            # Not `raw`: a parent may be 0 because of its own parent, so zeros spread down.
            if scores[parent] == 0:
                scores[question.proposition] = 0.0
                break
    return raw, scores


def score(
    graph: QuestionGraph,
    answers: Mapping[str, Sequence[Answers]],
    *,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = 0,
) -> BothWays:
    """Score the answers of all items.

    Args:
        answers: item id -> one `Answers` per image, in the order of the images.
        images_per_prompt: how many a complete prompt has.
        seed: for the bootstrap standard errors, which resample prompts; they do not depend on the
            order of the answers.

    Raises:
        UserError: there are no answers, an item is not in the graph or has more than
            `images_per_prompt` images, or a question has no answer.
    """
    if not isinstance(graph, QuestionGraph):
        raise UserError(f"score needs a QuestionGraph first, but got {graph!r:.80}")
    if not isinstance(answers, Mapping):
        raise UserError(
            f"score needs a mapping from items to answers, but got {answers!r:.80}: get each item's "
            "with dpg_bench.answerers.answer_prompt(answerer, images, questions)"
        )
    judged = {item: answers[item] for item in graph.items if answers.get(item)}
    if strangers := [item for item in answers if item not in graph.items]:
        raise UserError(f"answers for items without questions: {', '.join(strangers[:10])}")
    if not judged:
        raise UserError("no answers to score: judge at least one image first")
    for item, images in judged.items():
        _check_answers(graph.items[item], images, images_per_prompt)
    missing = [
        item if item not in judged else f"{item}: {len(judged[item])} of {images_per_prompt} images"
        for item in graph.items
        if len(judged.get(item, ())) < images_per_prompt
    ]
    return BothWays(
        official=_summarize(official_items(graph), judged, seed, last_image_only=True),
        corrected=_summarize(graph.items, judged, seed, last_image_only=False),
        missing=missing,
    )


def _check_answers(
    questions: Sequence[Question], images: Sequence[Answers], images_per_prompt: int
) -> None:
    """UserError unless these are answers to all questions of an item, image by image."""
    item = questions[0].item
    if isinstance(images, str | Mapping) or not all(isinstance(i, Mapping) for i in images):
        raise UserError(
            f"the answers of item {item} are {images!r:.80}: give a list with the answers of one "
            'image after another, such as [{"1": "yes", "2": "no"}]'
        )
    if len(images) > images_per_prompt:
        raise UserError(
            f"item {item} has answers for {len(images)} images, more than {images_per_prompt}"
        )
    for index, image in enumerate(images):
        for question in questions:
            given = image.get(str(question.proposition))
            if given is None:
                raise UserError(f"no answer to {question.place} for image {index}; judge it again")
            if not isinstance(given, str):  # True would count as a no
                raise UserError(
                    f"the answer to {question.place} for image {index} is {given!r:.80}: answers "
                    f'are texts, and only "{YES}" counts'
                )


def official_items(graph: QuestionGraph) -> dict[str, list[Question]]:
    """Item id -> the questions that the official script counts: all but the file's first."""
    return group_by_item(graph.questions[1:])


def _summarize(
    items: Mapping[str, Sequence[Question]],
    judged: Mapping[str, Sequence[Answers]],
    seed: int,
    *,
    last_image_only: bool,
) -> Tally:
    prompts, skipped = {}, {}
    for item, images in judged.items():
        if item not in items:
            skipped[item] = "its only question is dropped"
            continue
        try:
            scored = [score_image(items[item], image) for image in images]
        except MissingParentError as error:
            skipped[item] = str(error)
            continue
        per_image = [value for value, _ in scored]
        mean = sum(per_image) / len(per_image)
        prompts[item] = PromptScore(mean, per_image, [raw for _, raw in scored])
    values = {item: p.raw[-1:] if last_image_only else p.raw for item, p in prompts.items()}
    by_level = [
        {
            name: _mean(name, of_items, sum(len(values[i]) for i in of_items), seed)
            for name, of_items in sorted(_by_category(items, values, category).items())
        }
        for category in ("broad_category", "category")
    ]
    overall = {item: [prompt.score] for item, prompt in prompts.items()}
    count = sum(len(prompt.per_image) for prompt in prompts.values())
    l1, l2 = by_level
    return Tally(_mean("overall", overall, count, seed), l1, l2, prompts, skipped)


def _by_category(
    items: Mapping[str, Sequence[Question]], raw: Mapping[str, list[dict[int, float]]], level: str
) -> dict[str, dict[str, list[float]]]:
    """Category -> item -> the answers (0 or 1) to its questions for all images."""
    values: dict[str, dict[str, list[float]]] = {}
    for item, images in raw.items():
        for question in items[item]:
            of_items = values.setdefault(getattr(question, level), {})
            of_items.setdefault(item, []).extend(image[question.proposition] for image in images)
    return values


def _mean(name: str, values: Mapping[str, Sequence[float]], images: int, seed: int) -> Mean:
    """Mean over all values of all items; the bootstrap resamples items."""
    if not values:
        return Mean(None, None, 0, 0, 0)
    found, _ = mean_over_prompts(list(values.values()), name, seed=seed)
    stderr = None if found.stderr is None else 100 * found.stderr
    return Mean(100 * found.total / found.count, stderr, found.count, images, found.prompts)


def list_scores(scores: BothWays) -> list[Score]:
    """The overall scores, then each L1 category with its L2 categories; each both ways."""
    columns = {OFFICIAL: scores.official, CORRECTED: scores.corrected}
    names = [OVERALL]
    for broad in scores.corrected.l1:
        names += [broad, *(n for n in scores.corrected.l2 if n.startswith(f"{broad} -"))]
    found = []
    for name in names:
        for way, summary in columns.items():
            mean = ({OVERALL: summary.overall} | summary.l1 | summary.l2).get(name)
            if mean is not None:
                counts = (mean.images, mean.prompts)
                found.append(
                    Score(name, mean.mean, mean.stderr, *counts, headline=name == OVERALL, way=way)
                )
    return found


def format_scores(scores: BothWays, answerer: str) -> str:
    """A markdown table of both ways to count, with the answerer's name in its title."""
    table = score_table(list_scores(scores), f"DPG-Bench, judged by {answerer}", digits=2)
    text = f"{table}\n\n{LEGEND}"
    if scores.missing:
        text += f"\nINCOMPLETE: {len(scores.missing)} prompts lack images."
    return text

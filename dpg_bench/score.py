"""DPG-Bench's numbers: what the official script prints, and the same with its mistakes corrected.

Reference: `dpg_bench/compute_dpg_bench.py` of TencentQQGYLab/ELLA at 3c228f1 (arXiv 2403.05135). A
question scores 1 for the answer "yes", to the letter. Row by row, a question with a parent that
scores 0 by then scores 0 as well. An image scores the mean of its questions, a prompt the mean of
its images, the benchmark the mean of the prompts, times 100. Categories average the answers as they
were before parents were looked at.

`official` repeats three mistakes of that script (a fourth, the order of categories over several
processes, only garbles its tables):
- the first row of the CSV is dropped; a prompt that has a child of it, or nothing else, is skipped;
- a category's average is over the last image of each prompt alone;
- images that cannot be judged shrink the denominator.
`corrected` takes every question of every image; what it lacks is listed in `BothWays.missing`.
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
"""Proposition id (as text, for JSON) -> answer, of one image."""


@dataclass(frozen=True)
class Mean:
    """A mean in 0..100 (None of nothing), its bootstrap standard error (None of one prompt), and of
    what.

    n: values (prompts for the overall score, answers for a category), of so many images and
    prompts.
    """

    mean: float | None
    stderr: float | None
    n: int
    images: int
    prompts: int


@dataclass(frozen=True)
class PromptScore:
    """Fractions in 0..1: of the prompt and of its images; raw: each image's answers as 0 or 1."""

    score: float
    per_image: list[float]
    raw: list[dict[int, float]]


@dataclass(frozen=True)
class Tally:
    """One way to count. l1, l2: categories by name, sorted. skipped: item id -> why."""

    overall: Mean
    l1: dict[str, Mean]
    l2: dict[str, Mean]
    prompts: dict[str, PromptScore]
    skipped: dict[str, str]


@dataclass(frozen=True)
class BothWays:
    """Both ways to count, and what a complete run would have: "item" or "item: 3 of 4 images"."""

    official: Tally
    corrected: Tally
    missing: list[str]

    def _repr_markdown_(self) -> str:
        """How a notebook shows them."""
        return notebook_table(list_scores(self), "DPG-Bench", 2)


class MissingParentError(LookupError):
    """A question depends on a row that is not there."""


def score_image(questions: Sequence[Question], answers: Answers) -> tuple[float, dict[int, float]]:
    """One image's score (0..1), and its answers as 1 or 0 before parents were looked at.

    Raises:
        MissingParentError: a question's parent is not among `questions`.
    """
    raw, scores = score_questions(questions, answers)
    return sum(scores.values()) / len(scores), raw


def score_questions(
    questions: Sequence[Question], answers: Answers
) -> tuple[dict[int, float], dict[int, float]]:
    """Proposition -> 1 or 0, before and after parents were looked at; raises as `score_image`."""
    raw = {q.proposition: float(answers[str(q.proposition)] == YES) for q in questions}
    scores = dict(raw)
    for question in questions:
        for parent in question.parents:
            if parent not in scores:
                raise MissingParentError(
                    f"proposition {question.proposition} depends on {parent}, which is dropped"
                )
            # Not `raw`: a parent may be 0 because of its own parent, and so zeros spread.
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
    """Score answers: item id -> one `Answers` an image, in the images' order.

    images_per_prompt: what is complete. seed: of the bootstrap standard errors, which redraw
    prompts; they do not depend on the order of the answers.

    Raises:
        UserError: nothing to score, an item that the questions do not have, more images than
            there are, or a question without an answer.
    """
    if not isinstance(graph, QuestionGraph):
        raise UserError(f"score needs a QuestionGraph first, and got {graph!r:.80}")
    if not isinstance(answers, Mapping):
        raise UserError(
            f"score judges answers, by item, and got {answers!r:.80}: "
            "ask with dpg_bench.answerers.answer_prompt(answerer, images, questions) for each item"
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
    """The questions that the official script asks: all but the file's first."""
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
    """Category -> item -> the answers to its questions, of all images, as 0 or 1."""
    values: dict[str, dict[str, list[float]]] = {}
    for item, images in raw.items():
        for question in items[item]:
            of_items = values.setdefault(getattr(question, level), {})
            of_items.setdefault(item, []).extend(image[question.proposition] for image in images)
    return values


def _mean(name: str, values: Mapping[str, Sequence[float]], images: int, seed: int) -> Mean:
    """Mean over all values of all items; items are what the bootstrap redraws."""
    if not values:
        return Mean(None, None, 0, 0, 0)
    found, means_R = mean_over_prompts(list(values.values()), name, seed=seed)
    stderr = float(100 * means_R.std(ddof=1)) if found.prompts > 1 else None
    return Mean(100 * found.total / found.count, stderr, found.count, images, found.prompts)


def list_scores(scores: BothWays) -> list[Score]:
    """Both ways to count: the overall scores, then each L1 category with its L2 categories."""
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
    """A markdown table of both ways to count, under the name of who answered."""
    table = score_table(list_scores(scores), f"DPG-Bench, judged by {answerer}", digits=2)
    lacking = ""
    if scores.missing:
        lacking = f"\nINCOMPLETE: {len(scores.missing)} prompts lack images."
    return f"{table}\n\n{LEGEND}{lacking}"

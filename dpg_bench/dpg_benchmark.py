"""DPG-Bench as a benchmark for `t2i.evaluation.runner`: prompts, judge, scores, gallery cards.

    evaluate(DPGBench(graph, answerer), out, model=model)
    evaluate(DPGBench(graph, answerer), out, images=folder)

Each row of results.jsonl describes one image: its two scores, official and corrected, and every
question with its category, parents and answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from dpg_bench.answerers import OFFICIAL_ANSWERER, Answerer, check_answerer
from dpg_bench.questions import OFFICIAL_FILE, Question, QuestionGraph, broad, read_questions
from dpg_bench.score import (
    CORRECTED,
    LEGEND,
    OFFICIAL,
    OVERALL,
    YES,
    MissingParentError,
    list_scores,
    official_items,
    score,
    score_questions,
)
from t2i import __version__
from t2i.errors import UserError, nearest_path
from t2i.evaluation.gallery import Card
from t2i.evaluation.judging import Judged
from t2i.evaluation.results import Score
from t2i.sources import check_place
from t2i.worlds import WORLDS, open_world


class DPGBench:
    """A question graph and its answerer; see `t2i.evaluation.runner.Benchmark`."""

    name = "DPG-Bench"
    best = 100.0
    decimals = 2
    legend = LEGEND

    def __init__(self, graph: QuestionGraph, answerer: Answerer, *, questions: str = "own"):
        """questions: the graph's name in results.

        Raises:
            UserError: these are no graph and no answerer, or it cannot answer one of the questions.
        """
        if not isinstance(graph, QuestionGraph):
            raise UserError(
                f"graph is {graph!r:.80}: give dpg_bench.dpg_benchmark.load_questions(NAME)"
            )
        check_answerer(answerer)
        if hasattr(answerer, "check"):
            answerer.check(graph.questions)
        self.graph, self.answerer = graph, answerer
        self.items = list(graph.items)
        self.entries = prompt_entries(graph)
        self._official = official_items(graph)
        judge = answerer.identity()
        self.label = f"{questions} questions, judged by {judge['judge']}"
        if judge["judge"] != OFFICIAL_ANSWERER:
            facts = [judge.get("weights"), "not the official judge"]
            self.label += f" ({', '.join(filter(None, facts))})"

    def identity(self) -> dict:
        """The answerer, the question file and the kit's version."""
        judge = dict(self.answerer.identity())
        if judge.get("sha256"):  # identifies the weights, whatever their folder is called
            judge.pop("weights", None)
        graph = {"git_blob_sha1": self.graph.blob}
        return {"answers": judge, "questions": graph, "versions": {"t2i": __version__}}

    def judge(self, prompt_index: int, image: Image.Image, filename: str) -> Judged:
        """Answer all questions of the prompt and score the image."""
        item = self.items[prompt_index]
        questions = self.graph.items[item]
        given = self.answerer.answer(image, questions)
        answers = {str(q.proposition): a for q, a in zip(questions, given, strict=True)}
        corrected = _passed(questions, answers)
        row = {
            "filename": filename,
            **self.entries[prompt_index],
            OFFICIAL: _mean(_passed(self._official.get(item, ()), answers)),
            CORRECTED: _mean(corrected),
            "questions": [
                {
                    "proposition": q.proposition,
                    "tuple": q.tuple,
                    "category": q.category,
                    "parents": list(q.parents),
                    "question": q.text,
                    "answer": answers[str(q.proposition)],
                    "passed": bool(corrected.get(q.proposition)),
                }
                for q in questions
            ],
        }
        return Judged(row)

    def scores(self, rows: Sequence[dict]) -> list[Score]:
        """The overall score and the L1 and L2 categories, each official and corrected."""
        answers: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            given = {str(q["proposition"]): q["answer"] for q in row["questions"]}
            answers.setdefault(row["item_id"], []).append(given)
        most = max(map(len, answers.values()))
        return list_scores(score(self.graph, answers, images_per_prompt=most))

    def card(self, row: dict) -> Card | None:
        """The failed questions with their answers and parents; None if all passed."""
        if row[CORRECTED] in (1, None):
            return None
        failed = [q for q in row["questions"] if not q["passed"]]
        by_id = {q["proposition"]: q for q in row["questions"]}
        total = len(row["questions"])
        note = f"{row['item_id']}: {total - len(failed)} of {total} questions passed"
        reasons = [_reason(question, by_id) for question in failed]
        tags = sorted({broad(question["category"]) for question in failed})
        return Card("images", row["prompt"], reasons, note=note, tags=tags)


def _passed(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[int, float]:
    """Proposition -> 1 if it passed, otherwise 0; empty after a `MissingParentError`."""
    try:
        return score_questions(questions, answers)[1]
    except MissingParentError:
        return {}


def _mean(passed: Mapping[int, float]) -> float | None:
    """The image's score (0..1), None without questions."""
    return sum(passed.values()) / len(passed) if passed else None


def _reason(question: dict, by_id: Mapping[int, dict]) -> str:
    """A failed question with its answer, followed by the questions that it depends on."""
    parents = [f"depends on: {_outcome(by_id[parent])}" for parent in question["parents"]]
    return "\n".join([_outcome(question), *parents])


def _outcome(question: dict) -> str:
    """A question and its answer; a yes is void if a parent failed."""
    void = " (void)" if question["answer"] == YES and not question["passed"] else ""
    return f"{question['question']} →\N{NO-BREAK SPACE}{question['answer']}{void}"


def by_prompt(rows: Iterable[dict]) -> dict[str, dict[str, list[float]]]:
    """The values by which two results are compared: score -> item -> values in 0..100.

    Overall scores have one value per prompt, the mean of its images; categories (corrected only)
    have one value per answer.
    """
    images: dict[str, dict[str, list[float]]] = {OFFICIAL: {}, CORRECTED: {}}
    categories: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        item = row["item_id"]
        for way, of_items in images.items():
            if row[way] is not None:
                of_items.setdefault(item, []).append(row[way])
        for question in row["questions"]:
            value = 100.0 * (question["answer"] == YES)
            for name in (broad(question["category"]), question["category"]):
                categories.setdefault(name, {}).setdefault(item, []).append(value)
    groups = {
        f"{OVERALL} ({way})": {i: [100 * sum(v) / len(v)] for i, v in of_items.items()}
        for way, of_items in images.items()
        if of_items
    }
    return groups | {f"{name} ({CORRECTED})": categories[name] for name in sorted(categories)}


def prompt_entries(graph: QuestionGraph) -> list[dict]:
    """The prompts' metadata, ordered by folder number."""
    return [{"item_id": item, "prompt": prompt} for item, prompt in graph.prompts.items()]


def load_questions(name: str) -> QuestionGraph:
    """The question graph of "official" (fetched on first use), "shapes" (shipped) or a CSV file.

    Raises:
        UserError: as in `dpg_bench.questions.read_questions`; or the official file cannot be
            fetched, or the fetched file has the wrong hash.
    """
    check_place(name, "name")
    if name in WORLDS:
        return open_world(name).questions()
    if name != "official" and not Path(name).exists():
        known = ", ".join(("official", *WORLDS))
        text = f"there are no questions {name!r}: give {known} or a .csv file{nearest_path(name)}"
        raise UserError(text)
    return read_questions(OFFICIAL_FILE.find().path if name == "official" else name)

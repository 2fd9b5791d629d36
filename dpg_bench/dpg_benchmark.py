"""DPG-Bench as a benchmark for `t2i.evaluation.runner`: prompts, judge, numbers, gallery cards.

    evaluate(DPGBench(graph, answerer), out, model=model)
    evaluate(DPGBench(graph, answerer), out, images=folder)

A row of results.jsonl is an image: every question with its category, parents and answer, and the
image's score both ways.
"""

from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from dpg_bench.answerers import OFFICIAL_ANSWERER, Answerer
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
from t2i.evaluation.gallery import Card
from t2i.evaluation.judging import Judged
from t2i.evaluation.results import Score
from t2i.worlds import WORLDS, open_world


class DPGBench:
    """A question graph and who answers it; see `t2i.evaluation.runner.Benchmark`."""

    name = "DPG-Bench"
    best = 100.0
    decimals = 2
    legend = LEGEND

    def __init__(self, graph: QuestionGraph, answerer: Answerer, *, questions: str = "own"):
        """questions: what to call the graph.

        Raises:
            UserError: a question is not one of those that can be answered.
        """
        if hasattr(answerer, "check"):
            answerer.check(graph.questions)
        self.graph, self.answerer = graph, answerer
        self.items = list(graph.items)
        self.entries = prompt_entries(graph)
        self._official = official_items(graph)
        who = answerer.identity()
        self.label = f"{questions} questions, judged by {who['judge']}"
        if who["judge"] != OFFICIAL_ANSWERER:
            facts = [who.get("weights"), "not the official judge"]
            self.label += f" ({', '.join(filter(None, facts))})"

    def identity(self) -> dict:
        """Who answers which questions; weights by their hash, whatever their folder is called."""
        who = dict(self.answerer.identity())
        if who.get("sha256"):
            who.pop("weights", None)
        graph = {"git_blob_sha1": self.graph.blob}
        return {"answers": who, "questions": graph, "versions": {"t2i": __version__}}

    def judge(self, prompt_index: int, image: Image.Image, filename: str) -> Judged:
        """The answers to all questions of the prompt, and what they amount to."""
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
        """Overall, and by L1 and L2 category, each official and corrected."""
        answers: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            given = {str(q["proposition"]): q["answer"] for q in row["questions"]}
            answers.setdefault(row["item_id"], []).append(given)
        most = max(map(len, answers.values()))
        return list_scores(score(self.graph, answers, images_per_prompt=most))

    def card(self, row: dict) -> Card | None:
        """The questions that failed, with the answers and what they depend on."""
        failed = [q for q in row["questions"] if not q["passed"]]
        if row[CORRECTED] in (1, None):
            return None
        by_id = {q["proposition"]: q for q in row["questions"]}
        total = len(row["questions"])
        note = f"{row['item_id']}: {total - len(failed)} of {total} questions passed"
        reasons = [_reason(question, by_id) for question in failed]
        tags = sorted({broad(question["category"]) for question in failed})
        return Card("images", row["prompt"], reasons, note=note, tags=tags)


def _passed(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[int, float]:
    """Proposition -> whether it passed, 1 or 0; empty for a `MissingParentError`."""
    try:
        return score_questions(questions, answers)[1]
    except MissingParentError:
        return {}


def _mean(passed: Mapping[int, float]) -> float | None:
    """An image's score, 0..1."""
    return sum(passed.values()) / len(passed) if passed else None


def _reason(question: dict, by_id: Mapping[int, dict]) -> str:
    """A failed question with its answer; below it what it depends on (a yes without it is void)."""
    parents = [f"depends on: {_outcome(by_id[parent])}" for parent in question["parents"]]
    return "\n".join([_outcome(question), *parents])


def _outcome(question: dict) -> str:
    void = " (void)" if question["answer"] == YES and not question["passed"] else ""
    return f"{question['question']} →\N{NO-BREAK SPACE}{question['answer']}{void}"


def by_prompt(rows: Iterable[dict]) -> dict[str, dict[str, list[float]]]:
    """What two results are compared in: score -> item -> values in 0..100.

    The overall scores have one value a prompt, the mean of its images; the categories (corrected)
    one an answer.
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
    """The prompts' metadata, in the order of the folder numbers."""
    return [{"item_id": item, "prompt": prompt} for item, prompt in graph.prompts.items()]


def load_questions(name: str) -> QuestionGraph:
    """The graph called "official" (fetched on first use) or "shapes" (shipped), or of a CSV file.

    Raises:
        UserError: see `dpg_bench.questions.read_questions`; or the official file cannot be fetched,
            or is another one.
    """
    if name in WORLDS:
        return open_world(name).questions()
    return read_questions(OFFICIAL_FILE.find().path if name == "official" else name)

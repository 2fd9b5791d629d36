"""DPG-Bench's score: cases checked by hand, standard errors, and what is refused."""

import numpy as np
import pytest

from dpg_bench.answerers import answer_prompt
from dpg_bench.questions import Question, QuestionGraph
from dpg_bench.score import format_scores, score, score_image


def questions(item, *parents, category="entity - whole"):
    """Propositions 1, 2, ... with the given parents."""
    return [
        Question(item, f"prompt {item}", number, tuple(of), f"{category} (x)", f"{number}?", number)
        for number, of in enumerate(parents, start=1)
    ]


def graph_of(*rows):
    return QuestionGraph(tuple(q for part in rows for q in part), blob="")


def said(text):
    """ "yn" -> {"1": "yes", "2": "no"}."""
    return {str(i): {"y": "yes", "n": "no"}[c] for i, c in enumerate(text, start=1)}


def test_zero_spreads_to_grandchildren():
    value, raw = score_image(questions("a", (), (1,), (2,), ()), said("nyyy"))
    assert value == 0.25
    assert raw == {1: 0, 2: 1, 3: 1, 4: 1}


def test_a_child_before_its_parent_uses_the_original_answer():
    rows = questions("a", (), (1,), (2,))
    in_order, _ = score_image(rows, said("nyy"))
    child_first, _ = score_image([rows[2], rows[0], rows[1]], said("nyy"))
    assert (in_order, child_first) == (0, 1 / 3)


def test_one_failed_parent_is_enough_to_fail():
    assert score_image(questions("a", (), (), (1, 2)), said("yny"))[0] == 1 / 3


@pytest.mark.parametrize("answer", ["Yes", "yes.", " yes", "yes yes", "2", ""])
def test_only_a_literal_yes_counts(answer):
    assert score_image(questions("a", ()), {"1": answer})[0] == 0


def test_both_ways_to_count():
    graph = graph_of(questions("a", (), ()), questions("b", (), category="global -"))
    answers = {"a": [said("ny"), said("nn")], "b": [said("y"), said("n")]}
    report = score(graph, answers, images_per_prompt=2)
    assert report.corrected.overall.mean == pytest.approx(100 * (0.25 + 0.5) / 2)
    assert report.official.overall.mean == pytest.approx(100 * (0.5 + 0.5) / 2)  # row 1 dropped
    assert {k: v.mean for k, v in report.corrected.l1.items()} == {"entity": 25, "global": 50}
    assert {k: v.mean for k, v in report.official.l1.items()} == {"entity": 0, "global": 0}  # last
    assert [c.l2["global -"].n for c in (report.corrected, report.official)] == [2, 1]
    assert "| global - | 0.00 | - | 1 | 1 | 50.00 | - | 2 | 1 |" in format_scores(report, "mplug")


def test_a_prompt_whose_only_row_is_dropped_has_no_score():
    report = score(graph_of(questions("a", ())), {"a": [said("y")] * 4})
    assert report.official.overall.mean is None and report.official.l1 == {}
    assert report.official.skipped == {"a": "its only question is dropped"}
    text = format_scores(report, "mplug")
    assert "| **overall** | - | - | - | - | **100.00** |" in text


def test_missing_images_are_listed():
    graph = graph_of(*(questions(item, ()) for item in "abcd"))
    answers = {"a": [said("y")] * 4, "b": [said("y")] * 3, "c": []}
    assert score(graph, answers).missing == ["b: 3 of 4 images", "c", "d"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "no answers to score"),
        ({"z": [said("y")]}, "without questions: z"),
        ({"a": [said("y")]}, r"no answer to line 2 \(item a, proposition 2\) for image 0"),
        ({"a": [said("yy")] * 5}, "5 images, more than 4"),
    ],
)
def test_answers_that_do_not_fit(answers, message):
    with pytest.raises(ValueError, match=message):
        score(graph_of(questions("a", (), ())), answers)


def random_answers(rng, items, per_image):
    graph = graph_of(*(questions(str(i), (), (), ()) for i in range(items)))
    answers = {}
    for item in graph.items:
        rows = [said("".join(rng.choice(["y", "n"], 3))) for _ in range(4)]
        answers[item] = rows if per_image else [rows[0]] * 4
    return graph, answers


def test_standard_errors_cluster_by_prompt():
    rng = np.random.default_rng(0)
    errors = []
    for per_image in (True, False):
        corrected = score(*random_answers(rng, 200, per_image)).corrected
        assert corrected.overall.stderr == pytest.approx(corrected.l1["entity"].stderr, rel=0.1)
        errors.append(corrected.overall.stderr)
    # Analytic: 100 sqrt(p (1 - p) / n), with 12 or 3 independent answers per prompt.
    assert errors == pytest.approx([50 / 2400**0.5, 50 / 600**0.5], rel=0.15)


def test_standard_errors_depend_on_the_seed_but_not_on_the_order():
    graph, answers = random_answers(np.random.default_rng(1), 20, True)
    backwards = dict(reversed(answers.items()))
    first, second = score(graph, answers, seed=3), score(graph, backwards, seed=3)
    assert first == second
    assert score(graph, answers, seed=4).corrected.overall.stderr != first.corrected.overall.stderr
    assert score(graph, {"0": answers["0"]}).corrected.overall.stderr is None


class Echo:
    """A judge that answers with the image's width and the question's number."""

    def identity(self):
        return {"judge": "echo"}

    def answer(self, image, questions):
        return [f"{image.width} {q.proposition}" for q in questions]


def test_answer_prompt_keeps_images_and_questions_apart():
    from PIL import Image

    rows = questions("a", (), ())
    images = [Image.new("RGB", (width, 4)) for width in (8, 9)]
    assert answer_prompt(Echo(), images, rows) == [
        {"1": "8 1", "2": "8 2"},
        {"1": "9 1", "2": "9 2"},
    ]

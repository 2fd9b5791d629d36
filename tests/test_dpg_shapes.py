"""The shapes world's questions and their exact judge."""

import random

import numpy as np
import pytest
from PIL import Image

from dpg_bench.answerers import answer_prompt, load_answerer
from dpg_bench.questions import Question
from dpg_bench.score import score
from geneval.detector import Detections
from t2i.shapes.scenes import Scene, SceneObject, arrange, render
from t2i.shapes.shapes_prompts import TAGS, all_prompts
from t2i.shapes.shapes_questions import (
    PATH,
    graph_csv,
    questions_of,
    shapes_prompts,
    shapes_questions,
)

GRAPH = shapes_questions()
ENTRIES = shapes_prompts()


@pytest.fixture(scope="module")
def judge():
    return load_answerer("shapes")


def draw(item, seed=0):
    return render(arrange(random.Random(f"{item} {seed}"), ENTRIES[item]))


def picture(*objects):
    """An image with (shape, color, x, y) each, sides of 16 units."""
    return render(Scene(tuple(SceneObject(*o, 16) for o in objects), "", "", {}))


def said(judge, image, item):
    """Tuples of an item's propositions that do not hold."""
    rows = GRAPH.items[item]
    answers = judge.answer(image, rows)
    assert set(answers) <= {"yes", "no"}
    return [row.tuple for row, answer in zip(rows, answers, strict=True) if answer == "no"]


def test_the_shipped_file_equals_what_the_code_makes():
    assert PATH.read_text(encoding="utf-8") == graph_csv()


def test_the_graph_covers_attributes_relations_counts_and_globals():
    assert {question.category for question in GRAPH.questions} == {
        "entity - whole",
        "attribute - color",
        "other - count",
        "relation - spatial",
        "global -",
    }
    chained = [
        question
        for question in GRAPH.questions
        for parent in question.parents
        if GRAPH.items[question.item][parent - 1].parents
    ]
    assert chained, "without grandchildren, cascades would not be tested"
    assert len(GRAPH.items) == 60


def test_the_base_knows_every_word():
    words = {word for tag in TAGS for entry in all_prompts(tag) for word in entry["prompt"].split()}
    for prompt in GRAPH.prompts.values():
        assert set(prompt.split()) <= words
        assert len(prompt.split()) < 16  # the shapes base reads 16 tokens, the end included


def test_every_proposition_holds_in_an_image_of_its_prompt(judge):
    wrong = {item: said(judge, draw(item), item) for item in ENTRIES}
    assert {item: found for item, found in wrong.items() if found} == {}


DENSE = {
    "tag": "dense",
    "include": [
        {"class": "star", "count": 1, "color": "blue"},
        {"class": "circle", "count": 2, "color": "red"},
        {"class": "ring", "count": 1, "color": "green", "position": ["left of", 0]},
    ],
    "prompt": "a photo",
}
RED = [("circle", "red", 12, 52), ("circle", "red", 52, 52)]
STAR, RING = ("star", "blue", 50, 12), ("ring", "green", 12, 12)


@pytest.mark.parametrize(
    ("objects", "wrong"),
    [
        ([*RED, STAR, RING], []),
        ([RED[0], STAR, RING], ["color (circle", "count (circle", "count (shape"]),
        ([RED[0], ("circle", "pink", 52, 52), STAR, RING], ["color (circle"]),
        ([*RED, ("circle", "red", 32, 30), STAR, RING], ["count (circle", "count (shape"]),
        ([*RED, ("star", "pink", 50, 12), RING], ["color (star"]),
        ([*RED, ("star", "blue", 12, 12), ("ring", "green", 50, 12)], ["spatial (ring"]),
        (
            [*RED, RING],
            ["whole (star", "color (star", "count (shape", "spatial (ring"],
        ),
        (
            [*RED, STAR],
            ["whole (ring", "color (ring", "count (shape", "spatial (ring"],
        ),
    ],
)
def test_propositions_that_do_not_hold(judge, objects, wrong):
    rows = questions_of("x", DENSE)
    answers = judge.answer(picture(*objects), rows)
    no = [row.tuple for row, answer in zip(rows, answers, strict=True) if answer == "no"]
    assert sorted(found.split(" - ")[1].split(",")[0].rstrip(")") for found in no) == sorted(wrong)


def test_only_confident_shapes_are_counted(judge, monkeypatch):
    found = {"ring": Detections([[0, 0, 8, 8]] * 3, [0.95, 0.91, 0.5])}
    monkeypatch.setattr(judge.detector, "detect", lambda image: found)
    rows = [Question("x", "", n, (), f"other - count (shape, =={n})", "") for n in (1, 2, 3)]
    assert judge.answer(picture(STAR), rows) == ["no", "yes", "no"]


def test_a_missing_parent_fails_its_children(judge):
    rows = questions_of("x", DENSE)
    by_tuple = {row.tuple.split("(")[0]: row for row in rows if "ring" in row.tuple}
    assert by_tuple["attribute - color "].parents == (by_tuple["entity - whole "].proposition,)
    assert by_tuple["attribute - color "].proposition in by_tuple["relation - spatial "].parents


def test_a_better_drawing_scores_better(judge):
    items = ["dense0", "dense4", "position3", "counting2"]
    graph = type(GRAPH)(tuple(q for item in items for q in GRAPH.items[item]), "")
    empty = Image.new("RGB", (64, 64), (236, 235, 230))
    scores = []
    for images in ([empty] * 4, None):
        answers = {
            item: answer_prompt(judge, images or [draw(item, s) for s in range(4)], rows)
            for item, rows in graph.items.items()
        }
        scores.append(score(graph, answers).corrected)
    assert scores[0].overall.mean < 25 and scores[0].l2["global -"].mean == 100
    assert scores[1].overall.mean == 100


def test_background(judge):
    item = "single_object0"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert "global - (plain background)" in said(judge, Image.fromarray(noise), item)
    sky = Image.new("RGB", (64, 64), (150, 190, 255))
    assert "global - (plain background)" in said(judge, sky, item)
    drawn = np.asarray(draw(item)).astype(np.int16)
    soft = drawn + np.random.default_rng(0).normal(0, 5, drawn.shape)
    image = Image.fromarray(soft.clip(0, 255).astype(np.uint8))
    assert said(judge, image, item) == []


@pytest.mark.parametrize(
    "proposition",
    [
        "entity - whole (dog)",
        "attribute - color (circle, mauve)",
        "attribute - size (circle, small)",
        "relation - spatial (circle, behind, star)",
        "other - count (circle, two)",
        "global - (photo)",
        "entity - whole",
    ],
)
def test_foreign_propositions_are_refused(judge, proposition):
    question = Question("x", "", 1, (), proposition, "", line=7)
    with pytest.raises(ValueError, match=r"cannot answer.*line 7 \(item x, proposition 1\)"):
        judge.answer(picture(STAR), [question])


def test_the_shapes_judge_has_no_weights():
    assert load_answerer("shapes").identity()["judge"] == "shapes"
    with pytest.raises(ValueError, match="takes no weights"):
        load_answerer("shapes", "somewhere")

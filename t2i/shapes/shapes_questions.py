"""The shapes world's question graph, in DPG-Bench's schema: the whole benchmark without a network.

60 prompts: eight of each of the shapes world's GenEval tasks, and twelve denser ones (two coloured
shapes in a relation, a counted and coloured pair beside a third shape, three coloured shapes). The
propositions follow from what a prompt asks for, and `t2i.shapes.shapes_judge` answers them exactly.
`shapes_questions.csv` is the output of `graph_csv`.

A prompt's propositions (parents in brackets; a relation of coloured shapes hangs on their colours,
which hang on the shapes, so that a missing shape takes its colour and its relation along):

entity - whole (circle)
attribute - color (circle, red)                  [entity]  "(circle, red, ==2)" for two of them
other - count (circle, ==2)                      [entity]
relation - spatial (star, left of, circle)       [both colours, else both entities]
other - count (shape, ==3), global - (plain background)
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path

from dpg_bench.questions import COLUMNS, Question, QuestionGraph, read_questions
from t2i.shapes.shapes_prompts import (
    COLORS,
    NUMBER_WORDS,
    RELATIONS,
    SHAPES,
    TAGS,
    benchmark_prompts,
    plural,
    with_article,
)

PATH = Path(__file__).with_name("shapes_questions.csv")
PER_TAG = 8
PER_DENSE_KIND = 4
ANY_SHAPE = "shape"
PLAIN_BACKGROUND = "plain background"


def shapes_questions() -> QuestionGraph:
    """The shipped graph."""
    return read_questions(PATH)


def shapes_prompts(seed: int = 0) -> dict[str, dict]:
    """Item id ("colors3", "dense0") -> what the prompt asks for, as a GenEval entry."""
    entries = {}
    drawn = benchmark_prompts(seed, PER_TAG)
    for index, entry in enumerate(drawn):
        entries[f"{TAGS[index // PER_TAG]}{index % PER_TAG}"] = entry
    rng = random.Random(f"shapes dense {seed}")
    kinds = (_related, _counted, _three)
    for index in range(len(kinds) * PER_DENSE_KIND):
        entries[f"dense{index}"] = kinds[index // PER_DENSE_KIND](rng)
    return entries


def _related(rng: random.Random) -> dict:
    (shape, color), (other, other_color) = _objects(rng, 2)
    relation = rng.choice(RELATIONS)
    include = [
        {"class": other, "count": 1, "color": other_color},
        {"class": shape, "count": 1, "color": color, "position": [relation, 0]},
    ]
    phrase = f"{_one(shape, color)} {relation} {_one(other, other_color)}"
    return _entry(include, phrase)


def _counted(rng: random.Random) -> dict:
    (shape, color), (other, other_color) = _objects(rng, 2)
    include = [
        {"class": shape, "count": 2, "color": color},
        {"class": other, "count": 1, "color": other_color},
    ]
    return _entry(include, f"two {color} {plural(shape)} and {_one(other, other_color)}")


def _three(rng: random.Random) -> dict:
    objects = _objects(rng, 3)
    include = [{"class": shape, "count": 1, "color": color} for shape, color in objects]
    return _entry(include, " and ".join(_one(*item) for item in objects))


def _objects(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return list(zip(rng.sample(SHAPES, count), rng.sample(COLORS, count), strict=True))


def _one(shape: str, color: str) -> str:
    return f"{with_article(color)} {shape}"


def _entry(include: list[dict], phrase: str) -> dict:
    return {"tag": "dense", "include": include, "prompt": f"a photo of {phrase}"}


def questions_of(item: str, entry: dict) -> list[Question]:
    """The propositions of a prompt, parents before children."""
    rows = [
        Question(item, entry["prompt"], number, parents, proposition, text)
        for number, (parents, proposition, text) in enumerate(_propositions(entry), start=1)
    ]
    return rows


def _propositions(entry: dict) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(parents, tuple, question), numbered from 1 in this order."""
    include, number = entry["include"], 0
    entity: list[int] = []  # per object: the number of its entity
    latest: list[int] = []  # per object: the number of its colour, or else of its entity
    for wanted in include:
        shape, count = wanted["class"], wanted["count"]
        many = count > 1
        number += 1
        entity.append(number)
        latest.append(number)
        yield (), f"entity - whole ({shape})", f"Is there {with_article(shape)}?"
        if "color" in wanted:
            number += 1
            latest[-1] = number
            exact = f", =={count}" if many else ""
            asked = f"Are the {plural(shape)}" if many else f"Is the {shape}"
            proposition = f"attribute - color ({shape}, {wanted['color']}{exact})"
            yield (entity[-1],), proposition, f"{asked} {wanted['color']}?"
        if many:
            number += 1
            text = f"Are there exactly {NUMBER_WORDS[count]} {plural(shape)}?"
            yield (entity[-1],), f"other - count ({shape}, =={count})", text
    for index, wanted in enumerate(include):
        if "position" in wanted:
            relation, target = wanted["position"]
            shape, other = wanted["class"], include[target]["class"]
            proposition = f"relation - spatial ({shape}, {relation}, {other})"
            parents = tuple(sorted((latest[target], latest[index])))
            yield parents, proposition, f"Is the {shape} {relation} the {other}?"
    total = sum(wanted["count"] for wanted in include)
    word = NUMBER_WORDS.get(total, "one")
    text = (
        f"Are there exactly {word} shapes in the image?"
        if total > 1
        else "Is there only one shape?"
    )
    yield (), f"other - count ({ANY_SHAPE}, =={total})", text
    yield (), f"global - ({PLAIN_BACKGROUND})", "Is the background plain and light?"


def graph_csv(seed: int = 0) -> str:
    """The graph of `shapes_prompts(seed)` as the text of a DPG-Bench CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for item, entry in shapes_prompts(seed).items():
        for question in questions_of(item, entry):
            broad, _, detailed = question.category.partition("-")
            writer.writerow(
                {
                    "item_id": item,
                    "text": question.prompt,
                    "keywords": ", ".join(wanted["class"] for wanted in entry["include"]),
                    "proposition_id": question.proposition,
                    "dependency": ",".join(map(str, question.parents)) or "0",
                    "category_broad": broad.strip(),
                    "category_detailed": detailed.strip() or broad.strip(),
                    "tuple": question.tuple,
                    "question_natural_language": question.text,
                }
            )
    return buffer.getvalue()

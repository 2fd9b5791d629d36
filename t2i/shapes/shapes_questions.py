"""The shapes world's DPG-Bench: a question graph in its schema, and a judge that answers it.

60 prompts: eight of each of the shapes world's GenEval tasks, and twelve denser ones (two colored
shapes in a relation, two shapes of one kind and color with a third shape, three colored shapes).
The propositions follow from a prompt's metadata; `shapes_questions.csv` is the output of
`graph_csv`. The judge reads a question's proposition (its `tuple`), not its text, and answers with
the exact detector and GenEval's rules.

A prompt's propositions (parents in brackets; a relation of colored shapes depends on their colors,
which depend on the shapes, so that with a missing shape its color and its relation fail, too):

entity - whole (circle)
attribute - color (circle, red)                  [entity]  "(circle, red, ==2)" for two of them
other - count (circle, ==2)                      [entity]
relation - spatial (star, left of, circle)       [both colors, else both entities]
other - count (shape, ==3), global - (plain background)
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dpg_bench.questions import COLUMNS, Question, QuestionGraph, read_questions
from geneval.detector import Detections
from geneval.prompts import NUMBER_WORDS, RELATIONS, TAGS, entry_of, plural, wanted, with_article
from geneval.rules import RuleOptions, decide
from t2i.errors import UserError
from t2i.shapes.scenes import BACKGROUND, UNITS
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import COLORS, SHAPES, benchmark_prompts

PATH = Path(__file__).with_name("shapes_questions.csv")
PER_TAG = 8
PER_DENSE_KIND = 4
ANY_SHAPE = "shape"
PLAIN_BACKGROUND = "plain background"
# A background pixel may differ this much (0..255, in each channel) from the world's background, and
# at least this share of the pixels outside shapes must be background.
GROUND_TOLERANCE = 24
GROUND_SHARE = 0.97
EDGE = 2 / UNITS  # share of the image side: width of the soft edges that still belong to a shape


def shapes_questions() -> QuestionGraph:
    """The shipped question graph."""
    return read_questions(PATH)


def shapes_prompts() -> dict[str, dict]:
    """Item id ("colors3", "dense0") -> the prompt's GenEval entry."""
    entries = {}
    drawn = benchmark_prompts(0, PER_TAG)
    for index, entry in enumerate(drawn):
        entries[f"{TAGS[index // PER_TAG]}{index % PER_TAG}"] = entry
    rng = random.Random("shapes dense 0")
    kinds = (_related, _counted, _three)
    for index in range(len(kinds) * PER_DENSE_KIND):
        entries[f"dense{index}"] = kinds[index // PER_DENSE_KIND](rng)
    return entries


def _related(rng: random.Random) -> dict:
    (shape, color), (other, other_color) = _objects(rng, 2)
    relation = rng.choice(RELATIONS)
    placed = wanted(shape, color=color) | {"position": [relation, 0]}
    phrase = f"{_one(shape, color)} {relation} {_one(other, other_color)}"
    return entry_of("dense", [wanted(other, color=other_color), placed], phrase)


def _counted(rng: random.Random) -> dict:
    (shape, color), (other, other_color) = _objects(rng, 2)
    include = [wanted(shape, 2, color), wanted(other, color=other_color)]
    phrase = f"two {color} {plural(shape)} and {_one(other, other_color)}"
    return entry_of("dense", include, phrase)


def _three(rng: random.Random) -> dict:
    objects = _objects(rng, 3)
    include = [wanted(shape, color=color) for shape, color in objects]
    return entry_of("dense", include, " and ".join(_one(*item) for item in objects))


def _objects(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return list(zip(rng.sample(SHAPES, count), rng.sample(COLORS, count), strict=True))


def _one(shape: str, color: str) -> str:
    return f"{with_article(color)} {shape}"


def questions_of(item: str, entry: dict) -> list[Question]:
    """The propositions of a prompt, parents before children."""
    return [
        Question(item, entry["prompt"], number, parents, proposition, text)
        for number, (parents, proposition, text) in enumerate(_propositions(entry), start=1)
    ]


def _propositions(entry: dict) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Yield (parents, tuple, question), numbered from 1 in this order."""
    include, number = entry["include"], 0
    entity: list[int] = []  # per object: the number of its entity
    latest: list[int] = []  # per object: the number of its color, or else of its entity
    for item in include:
        shape, count = item["class"], item["count"]
        many = count > 1
        number += 1
        entity.append(number)
        latest.append(number)
        yield (), f"entity - whole ({shape})", f"Is there {with_article(shape)}?"
        if "color" in item:
            number += 1
            latest[-1] = number
            exact = f", =={count}" if many else ""
            asked = f"Are the {plural(shape)}" if many else f"Is the {shape}"
            proposition = f"attribute - color ({shape}, {item['color']}{exact})"
            yield (entity[-1],), proposition, f"{asked} {item['color']}?"
        if many:
            number += 1
            text = f"Are there exactly {NUMBER_WORDS[count]} {plural(shape)}?"
            yield (entity[-1],), f"other - count ({shape}, =={count})", text
    for index, item in enumerate(include):
        if "position" in item:
            relation, target = item["position"]
            shape, other = item["class"], include[target]["class"]
            proposition = f"relation - spatial ({shape}, {relation}, {other})"
            parents = tuple(sorted((latest[target], latest[index])))
            yield parents, proposition, f"Is the {shape} {relation} the {other}?"
    total, text = sum(item["count"] for item in include), "Is there only one shape?"
    if total > 1:
        text = f"Are there exactly {NUMBER_WORDS[total]} shapes in the image?"
    yield (), f"other - count ({ANY_SHAPE}, =={total})", text
    yield (), f"global - ({PLAIN_BACKGROUND})", "Is the background plain and light?"


def graph_csv() -> str:
    """The graph of `shapes_prompts` in DPG-Bench's CSV format."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, entry in shapes_prompts().items():
        for question in questions_of(name, entry):
            broad, _, detailed = question.category.partition("-")
            writer.writerow(
                {
                    "item_id": name,
                    "text": question.prompt,
                    "keywords": ", ".join(item["class"] for item in entry["include"]),
                    "proposition_id": question.proposition,
                    "dependency": ",".join(map(str, question.parents)) or "0",
                    "category_broad": broad.strip(),
                    "category_detailed": detailed.strip() or broad.strip(),
                    "tuple": question.tuple,
                    "question_natural_language": question.text,
                }
            )
    return buffer.getvalue()


# -- the judge -------------------------------------------------------------------------------------
class ShapesJudge:
    """An exact judge; see `dpg_bench.answerers.Answerer` for the interface."""

    name = "shapes"

    def __init__(self) -> None:
        self.detector = ShapesDetector()

    def identity(self) -> dict:
        return {"judge": self.name, "weights": None, "detector": type(self.detector).__name__}

    def check(self, questions: Sequence[Question]) -> None:
        """UserError for a proposition from outside the shapes world, before any image is drawn."""
        self.answer(Image.new("RGB", (UNITS, UNITS), BACKGROUND), questions)

    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """The true answers; UserError for a proposition from outside the shapes world."""
        image = image.convert("RGB")
        detections = self.detector.detect(image)
        return [
            "yes" if self._holds(image, detections, question) else "no" for question in questions
        ]

    def _holds(
        self, image: Image.Image, detections: Mapping[str, Detections], question: Question
    ) -> bool:
        arguments = _arguments(question)
        if (question.category, arguments) == ("global -", [PLAIN_BACKGROUND]):
            return has_plain_background(image, detections)
        if question.category == "other - count" and arguments[0] == ANY_SHAPE:
            sure = np.float32(RuleOptions().counting_threshold)
            found = sum(int((one.scores > sure).sum()) for one in detections.values())
            return found == _count(question, arguments[1])
        entry = self._geneval_entry(question, arguments)

        def colors_of(shape: str, indices: Sequence[int]) -> list[str]:
            return self.detector.classify_colors(image, shape, detections[shape].take(indices))

        return decide(entry, detections, colors_of).correct

    def _geneval_entry(self, question: Question, arguments: list[str]) -> dict:
        """The proposition as a GenEval entry, so that GenEval's rules decide on all of them."""
        exclude = None
        match question.category, arguments:
            case "entity - whole", [shape]:
                include = [wanted(shape)]
            case "attribute - color", [shape, color, *count]:
                include = [wanted(shape, _count(question, count[0]) if count else 1, color)]
            case "other - count", [shape, count]:
                number = _count(question, count)
                include, exclude = [wanted(shape, number)], [wanted(shape, number + 1)]
            case "relation - spatial", [shape, relation, other] if relation in RELATIONS:
                include = [wanted(other), wanted(shape) | {"position": [relation, 0]}]
            case _:
                raise _foreign(question)
        for item in include:
            known = item.get("color", self.detector.colors[0]) in self.detector.colors
            if item["class"] not in self.detector.classes or not known:
                raise _foreign(question)
        tag = "counting" if exclude else "single_object"
        return entry_of(tag, include, question.text, exclude)


def _arguments(question: Question) -> list[str]:
    match = re.fullmatch(r"[^(]*\((.*)\)\s*", question.tuple)
    if match is None:
        raise _foreign(question)
    return [part.strip() for part in match[1].split(",")]


def _count(question: Question, text: str) -> int:
    match = re.fullmatch(r"==(\d+)", text)
    if match is None:
        raise _foreign(question)
    return int(match[1])


def _foreign(question: Question) -> UserError:
    return UserError(
        f"the shapes judge cannot answer {question.tuple!r}, {question.place}: it only knows the "
        "shapes world's own questions; choose another judge"
    )


def has_plain_background(image: Image.Image, detections: Mapping[str, Detections]) -> bool:
    """Whether everything outside the detected shapes is the world's plain background."""
    shapes_HW = np.zeros(image.size[::-1], dtype=bool)
    for found in detections.values():
        assert found.masks is not None
        shapes_HW |= found.masks.any(axis=0)
    reach = max(1, round(EDGE * min(image.size)))
    grown = Image.fromarray(shapes_HW).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1))
    outside_HW = np.asarray(grown) == 0
    offset = np.abs(np.asarray(image.convert("RGB"), dtype=np.int16) - np.array(BACKGROUND))
    ground_HW = offset.max(axis=-1) <= GROUND_TOLERANCE
    return bool(outside_HW.any() and ground_HW[outside_HW].mean() >= GROUND_SHARE)

"""The shapes world's judge: its propositions answered by the exact detector and GenEval's rules.

It reads a question's `tuple` (see `t2i.shapes.shapes_questions`), not its words, and answers "yes"
or "no". Shapes: H x W image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter

from dpg_bench.questions import Question
from geneval.detector import Detections
from geneval.rules import RuleOptions, decide
from t2i.errors import UserError
from t2i.shapes.scenes import BACKGROUND, UNITS
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import RELATIONS
from t2i.shapes.shapes_questions import ANY_SHAPE, PLAIN_BACKGROUND

# A pixel of the ground may be this far (0..255, in each channel) from the world's ground, and this
# share of the pixels that belong to no shape must be ground.
GROUND_TOLERANCE = 24
GROUND_SHARE = 0.97
EDGE = 2 / UNITS  # of the image side: soft edges around a shape count as the shape's


class ShapesJudge:
    """See `dpg_bench.answerers.Answerer`."""

    name = "shapes"

    def __init__(self) -> None:
        self.detector = ShapesDetector()

    def identity(self) -> dict:
        return {"judge": self.name, "weights": None, "detector": type(self.detector).__name__}

    def check(self, questions: Sequence[Question]) -> None:
        """UserError for a proposition that is not the shapes world's, before there is any image."""
        self.answer(Image.new("RGB", (UNITS, UNITS), BACKGROUND), questions)

    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """The true answers. Raises UserError for a proposition that is not the shapes world's."""
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
        """The proposition as a GenEval prompt: one definition of what counting or "left of"
        means.
        """
        match question.category, arguments:
            case "entity - whole", [shape]:
                include = [{"class": shape, "count": 1}]
            case "attribute - color", [shape, color, *count]:
                number = _count(question, count[0]) if count else 1
                include = [{"class": shape, "count": number, "color": color}]
            case "other - count", [shape, count]:
                number = _count(question, count)
                entry = {"tag": "counting", "include": [{"class": shape, "count": number}]}
                return entry | {"exclude": [{"class": shape, "count": number + 1}]}
            case "relation - spatial", [shape, relation, other] if relation in RELATIONS:
                subject = {"class": shape, "count": 1, "position": [relation, 0]}
                include = [{"class": other, "count": 1}, subject]
            case _:
                raise _foreign(question)
        for wanted in include:
            known = wanted.get("color", self.detector.colors[0]) in self.detector.colors
            if wanted["class"] not in self.detector.classes or not known:
                raise _foreign(question)
        return {"tag": "single_object", "include": include}


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
        f"the shapes judge cannot answer {question.tuple!r}, {question.place}: it knows the shapes "
        "world's own questions only; choose another judge"
    )


def has_plain_background(image: Image.Image, detections: Mapping[str, Detections]) -> bool:
    """Whether what belongs to no detected shape is the world's plain ground."""
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

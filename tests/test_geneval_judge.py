"""The rules and the summary against golden verdicts of the official GenEval."""

import json
import re

import numpy as np
import pytest
from helpers import golden_folder
from PIL import Image

import geneval
from geneval.detector import Detections
from geneval.rules import (
    COLORS,
    RuleOptions,
    check_schema,
    decide,
    judge_image,
    relative_position,
    warn_of_doubts,
)
from geneval.summary import format_summary, result_row, summarize
from t2i.errors import UserError
from t2i.shapes.shapes_detector import ShapesDetector

ROOT = golden_folder("geneval_judge")
BLANK = Image.new("RGB", (64, 64), "white")
CONFIG = json.loads((ROOT / "config.json").read_text())


def read_lines(name):
    return [json.loads(line) for line in (ROOT / name).read_text().splitlines()]


def verdict_of(case, **options):
    found = case["detections"]
    detections = {name: Detections(d["boxes"], d["scores"]) for name, d in found.items()}
    return decide(
        case["metadata"],
        detections,
        lambda name, indices: [found[name]["colors"][i] for i in indices],
        RuleOptions(**options),
    )


def unordered(reason):
    """A reason with its two relations sorted: the official code joins a set."""
    return re.sub(
        r"found (.+) and (.+) target",
        lambda m: "found {} and {} target".format(*sorted(m.groups())),
        reason,
    )


def test_defaults_are_the_official_ones():
    options = {name: CONFIG[name] for name in RuleOptions.__dataclass_fields__}
    assert RuleOptions() == RuleOptions(**options)
    assert list(COLORS) == CONFIG["colors"]


@pytest.mark.parametrize("name", CONFIG["cases"] + CONFIG.get("optional_cases", []))
def test_golden_verdicts(name):
    cases = read_lines(name)
    assert cases
    for case in cases:
        options = {
            key: int(value) if key == "max_objects" else float(value)
            for key, value in case.get("options", {}).items()
        }
        verdict, expected = verdict_of(case, **options), case["expected"]
        assert verdict.correct == expected["correct"], case["id"]
        assert verdict.details == expected["details"], case["id"]
        assert unordered(verdict.reason) == unordered(expected["reason"]), case["id"]


@pytest.mark.parametrize("suite", CONFIG["suites"])
def test_golden_suites(suite):
    cases, expected = read_lines(f"{suite}.inputs.jsonl"), read_lines(f"{suite}.results.jsonl")
    rows = [
        result_row(e["filename"], c["metadata"], verdict_of(c))
        for c, e in zip(cases, expected, strict=True)
    ]
    for row, want in zip(rows, expected, strict=True):
        assert row | {"details": 0, "reason": 0} == want | {"details": 0, "reason": 0}
        assert json.loads(row["details"]) == json.loads(want["details"])
        assert unordered(row["reason"]) == unordered(want["reason"])
    summary = summarize(rows)
    numbers = json.loads((ROOT / f"{suite}.summary.json").read_text())
    tags = numbers.pop("tags")
    assert {key: getattr(summary, key) for key in numbers} == pytest.approx(numbers, abs=1e-12)
    assert list(summary.tags) == list(tags)
    for tag, want in tags.items():
        assert {key: getattr(summary.tags[tag], key) for key in want} == pytest.approx(want)
    assert format_summary(summary) == (ROOT / f"{suite}.summary.txt").read_text().rstrip("\n")


def test_relative_position_is_antisymmetric():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        corners = rng.uniform(0, 100, (2, 2, 2)).astype(np.float32)
        a, b = np.concatenate([corners.min(1), corners.max(1)], axis=-1)
        there, back = relative_position(a, b), relative_position(b, a)
        assert {opposite[r] for r in there} == set(back)
        seen.add(len(there))
    assert seen == {0, 1, 2}


def test_a_tiny_offset_is_none():
    box = np.array([0, 0, 8, 8], np.float32)
    assert relative_position(box + np.float32(5e-4), box, margin=0.0) == []


def test_a_position_holds_for_every_pair_of_objects():
    dogs, cat = [[10, 0, 18, 8], [90, 0, 98, 8]], [[50, 0, 58, 8]]
    found = {"dog": Detections(dogs, [0.9, 0.8]), "cat": Detections(cat, [0.9])}
    for count, correct in ((1, True), (2, False)):
        cat = {"class": "cat", "count": 1, "position": ["right of", 0]}
        wanted = {"tag": "position", "include": [{"class": "dog", "count": count}, cat]}
        assert decide(wanted, found, lambda *_: []).correct == correct


def rows_of(rates, per_prompt=4):
    """Rows of prompts that have these numbers of correct images."""
    return [
        {"tag": tag, "metadata": f"{tag} {prompt}", "correct": image < right}
        for tag, rights in rates.items()
        for prompt, right in enumerate(rights)
        for image in range(per_prompt)
    ]


@pytest.mark.parametrize(("limit", "kept"), [(0.34, 2), (0.33, 1)])
def test_boxes_that_overlap_too_much_are_one_object(limit, kept):
    """A side from 0 to 9 is ten pixels long, so that these two boxes share a third of their union
    (0.286 if it were nine).
    """
    entry = {"prompt": "", "tag": "counting", "include": [{"class": "bus", "count": 1}]}
    found = Detections(np.array([[0, 0, 9, 9], [5, 0, 14, 9]]), np.array([0.99, 0.98]))
    verdict = decide(entry, {"bus": found}, lambda *_: [], RuleOptions(max_overlap=limit))
    assert verdict.correct and list(verdict.kept["bus"]) == list(range(kept))


def test_an_overlap_of_just_the_limit_is_too_much():
    entry = {"prompt": "", "tag": "counting", "include": [{"class": "bus", "count": 1}]}
    found = Detections(np.array([[0, 0, 9, 9], [0, 0, 9, 4]]), np.array([0.99, 0.98]))
    verdict = decide(entry, {"bus": found}, lambda *_: [], RuleOptions(max_overlap=0.5))
    assert list(verdict.kept["bus"]) == [0]


def test_standard_errors_cluster_by_prompt():
    rng = np.random.default_rng(0)
    independent = rows_of({"colors": rng.binomial(4, 0.5, 200)})
    clustered = rows_of({"colors": 4 * rng.binomial(1, 0.5, 200)})
    errors = [summarize(rows, seed=1).tags["colors"].stderr for rows in (independent, clustered)]
    # Analytic: sqrt(p (1 - p) / n), with n = 800 images or n = 200 prompts.
    assert errors == pytest.approx([0.25**0.5 / 800**0.5, 0.25**0.5 / 200**0.5], rel=0.12)


def test_standard_errors_do_not_depend_on_row_order_but_on_the_seed():
    rows = rows_of({"colors": [0, 1, 2, 3, 4, 4], "counting": [0, 0, 1, 2, 2]})
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    first, second = summarize(rows, seed=3), summarize(shuffled, seed=3)
    assert first.overall_stderr == second.overall_stderr > 0
    assert first.tags == second.tags
    assert summarize(rows, seed=4).overall_stderr != first.overall_stderr


def test_the_overall_standard_error_is_that_of_a_mean_of_independent_tasks():
    """A task that is always solved has an error of 0, which counts."""
    summary = summarize(
        rows_of({"colors": [0, 1, 2, 3], "counting": [0, 4, 4], "position": [4, 4]})
    )
    errors = [score.stderr for score in summary.tags.values()]
    assert errors[2] == 0 and summary.overall_stderr == pytest.approx(np.hypot(*errors[:2]) / 3)


def test_one_prompt_has_no_standard_error():
    summary = summarize(rows_of({"colors": [2]}))
    assert summary.tags["colors"].stderr is None
    assert summary.overall_stderr is None


class OneDog:
    """A detector that always detects one brown dog."""

    classes = ("dog", "cat")
    colors = ("brown", "black")

    def detect(self, image):
        return {"dog": Detections([[0, 0, 8, 8]], [0.95])}

    def classify_colors(self, image, class_name, detections):
        return ["brown"] * len(detections)


def entry(name, tag="colors", **wanted):
    include = [{"class": name, "count": 1} | wanted]
    return {"tag": tag, "include": include, "prompt": f"a photo of {wanted} {name}"}


def test_score_takes_images_prompt_by_prompt():
    images = [Image.new("RGB", (8, 8))] * 4
    report = geneval.score(images, [entry("dog", color="brown"), entry("cat")], OneDog())
    assert [v.correct for v in report.verdicts] == [True, True, False, False]
    assert report.summary.overall == 0.5
    assert report.summary.total_prompts == 2


@pytest.mark.parametrize(
    ("images", "wanted", "message"),
    [
        (3, {}, "3 images for 2 prompts"),
        (2, {"color": "white"}, "white"),
        (2, {"class": "cow"}, "cow"),
    ],
)
def test_score_refuses_arguments_that_do_not_fit(images, wanted, message):
    metadata = [entry("dog"), entry("cat", **wanted)]
    with pytest.raises(ValueError, match=message):
        geneval.score([Image.new("RGB", (8, 8))] * images, metadata, OneDog())


@pytest.mark.parametrize(
    "wanted",
    [
        {"count": "1"},
        {"count": 0},
        {"count": True},
        {"class": ["cat"]},
        {"position": ["left", 0]},
        {"position": ["left of", 1]},
        {"position": "left of"},
    ],
)
def test_metadata_that_cannot_be_judged(wanted):
    """It used to be an IndexError after all images were drawn, or no image could ever be right."""
    good = {"class": "dog", "count": 1}
    include = [good, good | {"position": ["left of", 0]}]
    check_schema({"tag": "position", "prompt": "a", "include": include}, "prompt 0")
    for missing in ({"tag": "position"}, {"prompt": "a"}):
        with pytest.raises(UserError, match=r"prompt 0 is .* not GenEval metadata"):
            check_schema(missing | {"include": include}, "prompt 0")
    include[1] |= wanted
    with pytest.raises(UserError, match=r"prompt 0 is .* not GenEval metadata"):
        check_schema({"tag": "position", "prompt": "a", "include": include}, "prompt 0")


CIRCLES = {"class": "circle", "count": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": [CIRCLES | {"colour": "red"}]}, "'colour' of 'circle' in include is not"),
        (
            {"include": [CIRCLES | {"relation": ["above", 0]}]},
            "'relation' of 'circle' in include is not",
        ),
        (
            {"exclude": [CIRCLES | {"count": 4, "color": "red"}]},
            "'color' of 'circle' in exclude is not",
        ),
        ({"excludes": [CIRCLES]}, "'excludes' is not judged"),
        ({"Exclude": [CIRCLES]}, "'Exclude' is not judged"),
        ({"tag": "Counting"}, "the tag 'Counting' is judged by other rules than 'counting'"),
        ({"exclude": [CIRCLES]}, "at least 3 'circle', exclude for fewer than 3"),
    ],
)
def test_edits_that_change_the_verdict_are_pointed_out(change, message, caplog):
    """They are judged as in the official script, which ignores them, but no longer in silence."""
    entry = {"tag": "counting", "include": [CIRCLES], "prompt": "three circles", "id": 7}
    warn_of_doubts([entry, entry | {"exclude": [CIRCLES | {"count": 4}]}])
    assert not caplog.messages
    warn_of_doubts([entry, check_schema(entry | change, "prompt 1")])
    [said] = caplog.messages
    assert said.startswith("prompt 1: ") and message in said


ASKED = {"tag": "single_object", "prompt": "a circle", "include": [{"class": "circle", "count": 1}]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RuleOptions(threshold=float("nan")), "threshold=nan must be a finite"),
        (lambda: RuleOptions(counting_threshold="0.9"), "counting_threshold is '0.9'"),
        (lambda: RuleOptions(max_objects=0), "max_objects=0 must be at least 1"),
        (lambda: Detections([[1, 2, 3, 4]], [0.9, 0.8]), r"boxes are \[1, 4\] and scores \[2\]"),
        (lambda: Detections([[1, 2, 3, 4]], 0.9), r"scores \[\]: expected \[n, 4\]"),
        (lambda: Detections([[1, 2, 3, 4]], [float("nan")]), "box or score is not finite"),
        (
            lambda: Detections(np.zeros((1, 4)), [1], np.zeros((1, 8, 8))),
            r"masks must be an array of bool \[1, H, W\]",
        ),
        (lambda: decide("a circle", {}, None), "metadata is 'a circle': give the prompt's entry"),
        (lambda: decide(ASKED, [], None), r"detections is \[\]: give \{class: Detections\}"),
        (lambda: decide(ASKED, {}, None, {"threshold": 0.5}), "options is .*geneval.RuleOptions"),
        (lambda: judge_image(None, ASKED, ShapesDetector()), "image is None: give a PIL image"),
        (lambda: judge_image(None, "a circle", ShapesDetector()), "metadata is 'a circle': give"),
        (lambda: geneval.score(BLANK, ASKED, ShapesDetector(), seed=None), "seed=None must be"),
        (lambda: summarize([], seed=-1), "seed=-1 must be between"),
        (lambda: summarize(3), "rows is 3: give a list of rows, as geneval.result_row"),
        (
            lambda: summarize([geneval.Verdict(True, "")]),
            r"Verdict\(.* is no result row: geneval.result_",
        ),
        (lambda: format_summary([]), r"summary is \[\]: give what geneval.summarize returns"),
        (lambda: result_row("a.png", ASKED, True), "verdict is True: give one of judge_image's"),
        (
            lambda: result_row("a.png", "a cat", geneval.Verdict(True, "")),
            "metadata is 'a cat': give the",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_nothing_to_summarize():
    with pytest.raises(ValueError, match="no verdicts"):
        summarize([])

"""GenEval's rules: turn detections into a verdict, identical to the official one.

Reference: `evaluation/evaluate_images.py` of djghosh13/geneval at af4902f (arXiv 2310.11513).
Easy to get wrong, and tested against golden verdicts:
- a score, in float32, must be strictly above the threshold; "counting" has its own threshold;
- of detections with equal scores, the later one comes first;
- only the `count` most confident objects of a class are checked for color and position;
- a position is judged only if the object's count and color were right.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from geneval.detector import Detections, Detector
from t2i.errors import UserError
from t2i.fields import check_types
from t2i.sampling import check_counts

log = logging.getLogger(__name__)

COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)

RELATIONS = ("left of", "right of", "above", "below")

_READ = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}
"""What is judged of the objects in both lists of an entry."""
_COUNTING = "counting"
_NOTHING = Detections(np.zeros((0, 4)), np.zeros(0))

ColorsOf = Callable[[str, Sequence[int]], Sequence[str]]


@dataclass(frozen=True)
class RuleOptions:
    """The official command line's options and their defaults.

    max_overlap 1.0 means no non-maximum suppression.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(max_objects=self.max_objects)
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise UserError(f"{name}={value} must be a finite number")


_OFFICIAL = RuleOptions()


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, why not, and the detections that the verdict rests on.

    reason: one line per failure; empty if correct.
    details: class -> [[x0, y0, x1, y1, score], ...], most confident first.
    kept: class -> the indices of these boxes among the class's detections.
    """

    correct: bool
    reason: str
    details: dict[str, list[list[float]]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)


def decide(
    metadata: Mapping,
    detections: Mapping[str, Detections],
    colors_of: ColorsOf,
    options: RuleOptions | None = None,
) -> Verdict:
    """The verdict on one image for one GenEval prompt.

    metadata: the prompt's entry (tag, include, exclude). detections: class -> `Detections`.
    colors_of(class name, indices into that class's detections) -> one color name for each index;
    it is called only for objects whose color the prompt names.

    Raises UserError if an argument is of the wrong type. The entry is not checked further, as in
    the official script (see `check_schema`).
    """
    _check_tagged(metadata)
    options = checked_options(options)
    if not isinstance(detections, Mapping):
        raise UserError(f"detections is {detections!r:.80}: give {{class: Detections}}")
    threshold = options.counting_threshold if metadata["tag"] == _COUNTING else options.threshold
    kept = {name: _select(found, threshold, options) for name, found in detections.items()}
    reasons: list[str] = []
    matched: list[np.ndarray | None] = []  # boxes [count, 4] per include; None if failed
    for wanted in metadata.get("include", []):
        name = wanted["class"]
        chosen = kept.get(name, [])[: wanted["count"]]
        failure = _count_failure(wanted, chosen) or _color_failure(wanted, chosen, colors_of)
        boxes = detections.get(name, _NOTHING).boxes[chosen]
        if failure is None and "position" in wanted:
            failure = _position_failure(wanted, boxes, matched, options.position_threshold)
        matched.append(boxes if failure is None else None)
        if failure is not None:
            reasons.append(failure)
    for banned in metadata.get("exclude", []):
        found = len(kept.get(banned["class"], []))
        if found >= banned["count"]:
            reasons.append(f"expected {banned['class']}<{banned['count']}, found {found}")
    details = {
        name: np.column_stack([detections[name].boxes, detections[name].scores])[chosen].tolist()
        for name, chosen in kept.items()
        if chosen
    }
    kept = {name: kept[name] for name in details}
    return Verdict(not reasons, "\n".join(reasons), details, kept)


def _check_tagged(metadata: object) -> None:
    if not isinstance(metadata, Mapping) or "tag" not in metadata:
        raise UserError(
            f"metadata is {metadata!r:.80}: give the prompt's entry in GenEval's metadata, such as "
            '{"tag": "counting", "prompt": "two cats", "include": [{"class": "cat", "count": 2}]} '
            "(geneval.score also takes the text of GenEval's own prompts)"
        )


def checked_options(options: RuleOptions | None) -> RuleOptions:
    """The options, or GenEval's own if None; UserError if they are neither."""
    if not isinstance(options, RuleOptions | None):
        raise UserError(f"options is {options!r:.80}: give geneval.RuleOptions(threshold=0.3, ...)")
    return options or _OFFICIAL


def judge_image(
    image: Image.Image, metadata: Mapping, detector: Detector, options: RuleOptions | None = None
) -> Verdict:
    """Detect, then judge.

    Raises UserError if an argument is of the wrong type, or the detector does not know a class or
    color asked for.
    """
    _check_tagged(metadata)
    check_vocabulary(metadata, detector)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"image is {image!r:.80}: give a PIL image (geneval.score also takes files and arrays)"
        )
    return judge_detected(image, metadata, detector, detector.detect(image), options)


def check_schema(entry: object, where: str) -> Mapping:
    """The entry, if it is valid GenEval metadata; otherwise UserError, which names `where`."""
    if isinstance(entry, Mapping) and "prompt" in entry and isinstance(entry.get("tag"), str):
        asked = [entry[name] for name in ("include", "exclude") if name in entry]
        if (
            all(isinstance(part, Sequence) for part in asked)
            and any(asked)
            and all(_can_be_judged(item, i) for part in asked for i, item in enumerate(part))
        ):
            return entry
    raise UserError(
        f"{where} is {entry!r:.200}, which is not GenEval metadata: give a tag, a prompt and "
        'include (or exclude), a list of objects such as {"class": "bus", "count": 1}, optionally '
        'with a "color", or with a "position" relative to an earlier object, as in ["left of", 0]'
    )


def check_entries(entries: Sequence[Mapping], detector: Detector) -> None:
    """UserError for metadata that is not GenEval's or that the detector cannot judge; warns of
    metadata that is judged otherwise than its author may expect.
    """
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        raise UserError(
            f"entries is {entries!r:.80}: give a list of GenEval's metadata, such as "
            'geneval.geneval_benchmark.load_prompts("official")'
        )
    for index, entry in enumerate(entries):
        check_vocabulary(check_schema(entry, f"prompt {index}"), detector)
    warn_of_doubts(entries)


def warn_of_doubts(entries: Sequence[Mapping]) -> None:
    """Warn of valid metadata that is judged otherwise than its author may expect."""
    found = [
        (place, doubt)
        for place, entry in enumerate(entries)
        for doubt in (*_unread(entry), *_impossible(entry))
    ]
    if found:
        more = f" ({len(found)} such doubts in all)" if len(found) > 1 else ""
        log.warning("prompt %d: %s%s", *found[0], more)


def _unread(entry: Mapping) -> Iterator[str]:
    """What the rules do not read although it was probably meant to be judged."""
    for part, keys in _READ.items():
        for item in entry.get(part, ()):
            if unread := [key for key in item if key not in keys]:
                yield (
                    f"{unread[0]!r} of {item['class']!r} in {part} is not judged; only "
                    f"{', '.join(keys)} are"
                )
    for key in entry:
        if str(key).lower().startswith(("includ", "exclud")) and key not in _READ:
            yield f"{key!r} is not judged; only {' and '.join(_READ)} are"
    if (tag := entry["tag"]) != _COUNTING and tag.strip().lower() == _COUNTING:
        yield f"the tag {tag!r} is judged by other rules than {_COUNTING!r}"


def _impossible(entry: Mapping) -> Iterator[str]:
    """Counts that no image can have, as after an edit of only one of the two."""
    wanted = [(item["class"], item["count"]) for item in entry.get("include", ())]
    for banned in entry.get("exclude", ()):
        for name, count in wanted:
            if name == banned["class"] and banned["count"] <= count:
                yield (
                    f"no image can be correct: include asks for at least {count} {name!r}, exclude for "
                    f"fewer than {banned['count']} (exactly {count} are an exclude count of {count + 1})"
                )


def _can_be_judged(item: object, place: int) -> bool:
    """Whether the requested object at index `place` has every field that the rules read."""
    if not isinstance(item, Mapping) or not isinstance(item.get("class"), str):
        return False
    relation = item.get("position", [RELATIONS[0], 0])
    if not isinstance(relation, Sequence) or len(relation) != 2 or relation[0] not in RELATIONS:
        return False
    numbers = (item.get("count"), relation[1])
    if not all(type(number) is int for number in numbers):  # nor true
        return False
    return item["count"] >= 1 and ("position" not in item or 0 <= relation[1] < place)


def check_vocabulary(metadata: Mapping, detector: Detector) -> None:
    """UserError if a class or color is unknown to the detector, or `detector` is not a detector."""
    if isinstance(detector, str | type) or not hasattr(detector, "detect"):
        raise UserError(
            f"detector is {detector!r:.80}: give a loaded detector, such as "
            'geneval.detectors.load_detector("shapes"), or with "mask2former"'
        )
    for item in [*metadata.get("include", []), *metadata.get("exclude", [])]:
        if item["class"] not in detector.classes:
            raise UserError(
                f"the detector does not know {item['class']!r} in {metadata['prompt']!r}; "
                f"it knows {', '.join(detector.classes)}"
            )
        if "color" in item and item["color"] not in detector.colors:
            raise UserError(
                f"the detector does not know {item['color']!r} in {metadata['prompt']!r}; "
                f"it knows {', '.join(detector.colors)}"
            )


def judge_detected(
    image: Image.Image,
    metadata: Mapping,
    detector: Detector,
    detections: Mapping[str, Detections],
    options: RuleOptions | None = None,
) -> Verdict:
    """Judge detections of an image; `detector` is used only to name their colors."""
    return decide(metadata, detections, name_colors(image, detector, detections), options)


def name_colors(
    image: Image.Image, detector: Detector, detections: Mapping[str, Detections]
) -> ColorsOf:
    """What `decide` asks for the colors of an image's detections."""

    def colors_of(name: str, indices: Sequence[int]) -> list[str]:
        return detector.classify_colors(image, name, detections[name].take(indices))

    return colors_of


def _select(found: Detections, threshold: float, options: RuleOptions) -> list[int]:
    """Indices of the detections kept by threshold, cap and suppression, most confident first."""
    # An ascending stable sort read backwards puts the last of equal scores first.
    order = np.argsort(found.scores, kind="stable")[::-1]
    above = found.scores[order] > np.float32(threshold)
    candidates = order[above][: options.max_objects].tolist()
    if options.max_overlap == 1:
        return candidates
    chosen: list[int] = []
    for index in candidates:
        overlaps = (_iou(found.boxes[other], found.boxes[index]) for other in chosen)
        if all(overlap < options.max_overlap for overlap in overlaps):
            chosen.append(index)
    return chosen


def _count_failure(wanted: Mapping, chosen: Sequence[int]) -> str | None:
    if len(chosen) >= wanted["count"]:
        return None
    return f"expected {wanted['class']}>={wanted['count']}, found {len(chosen)}"


def _color_failure(wanted: Mapping, chosen: Sequence[int], colors_of: ColorsOf) -> str | None:
    if "color" not in wanted:
        return None
    colors = list(colors_of(wanted["class"], chosen))
    right = colors.count(wanted["color"])
    if right >= wanted["count"]:
        return None
    counts = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return (
        f"expected {wanted['color']} {wanted['class']}>={wanted['count']}, "
        f"found {right} {wanted['color']}; and {counts}"
    )


def _position_failure(
    wanted: Mapping, boxes: np.ndarray, matched: Sequence[np.ndarray | None], margin: float
) -> str | None:
    """The failure of the first (object, target) pair that is not in the wanted relation."""
    relation, target = wanted["position"]
    if matched[target] is None:
        return f"no target for {wanted['class']} to be {relation}"
    for box in boxes:
        for reference in matched[target]:
            relations = relative_position(box, reference, margin)
            if relation not in relations:
                named = " and ".join(relations)
                return f"expected {wanted['class']} {relation} target, found {named} target"
    return None


def relative_position(box: np.ndarray, reference: np.ndarray, margin: float = 0.1) -> list[str]:
    """The relations of `box` to `reference` (both float32 [4]): none, one or two of the four.

    In each direction, the offset of the centers is reduced by `margin` times the summed sizes and
    divided by the length of the full offset; the relation holds if the result exceeds 0.5.
    """
    corners = np.stack([box, reference]).reshape(2, 2, 2)  # box, corner, (x, y)
    center, size = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = center[0] - center[1]
    reduced = np.maximum(np.abs(offset) - margin * size.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(reduced) < 1e-3):
        return []
    dx, dy = reduced / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return [relation for relation, true in holds.items() if true]


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union, with sides one pixel longer, as in the official judge."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low + 1, 0))
    union = np.prod(a[2:] - a[:2] + 1) + np.prod(b[2:] - b[:2] + 1) - shared
    return float(shared / union) if union else 0.0

"""The shapes world: flat colored shapes on a plain background, drawn and captioned offline.

Everything is a pure function of (seed, index): a scene's objects, their places and its prompt.
Geometry is in whole units of 1/64 of the image side, so that at 64 px (and its multiples) straight
edges fall on pixel borders. `shapes_detector` detects the shapes in images, `shapes_prompts`
defines the language, `shapes_source` makes data sets of scenes.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

from geneval.prompts import TAGS
from t2i.shapes.shapes_prompts import COLORS, training_prompts

UNITS = 64  # scene geometry is in units of 1/UNITS of the image side
GAP = 3  # least distance between two boxes, units
MARGIN = 2  # least distance to the border, units
SUPERSAMPLING = 8
BACKGROUND = (236, 235, 230)
PALETTE = {
    "red": (212, 38, 38),
    "orange": (247, 138, 26),
    "yellow": (250, 214, 40),
    "green": (38, 156, 76),
    "blue": (40, 92, 214),
    "purple": (128, 56, 172),
    "pink": (246, 132, 186),
    "black": (32, 32, 36),
}
SIZES = {1: (22, 30), 2: (18, 24), 3: (16, 20), 4: (14, 18)}  # object count -> box side, units

Outline = tuple[tuple[float, float], ...]
_LOW, _HIGH = 1 / 3, 2 / 3  # the cross's arms
_POLYGONS: dict[str, Outline] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": (
        *((_LOW, 0), (_HIGH, 0), (_HIGH, _LOW), (1, _LOW), (1, _HIGH), (_HIGH, _HIGH)),
        *((_HIGH, 1), (_LOW, 1), (_LOW, _HIGH), (0, _HIGH), (0, _LOW), (_LOW, _LOW)),
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape: class, color, box centre (x, y) and box side, in units; y points down."""

    shape: str
    color: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in units."""
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A captioned arrangement. `metadata` is the prompt's GenEval entry (tag, include, ...)."""

    objects: tuple[SceneObject, ...]
    tag: str
    prompt: str
    metadata: dict


def sample_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`: a random arrangement for a random training prompt.

    All tags are equally likely, then all prompts of the tag, except held-out ones
    (see `t2i.shapes.shapes_prompts`). Attributes that the prompt leaves open are random.
    """
    rng = random.Random(f"shapes scene {seed} {index}")
    return arrange(rng, rng.choice(training_prompts(rng.choice(TAGS))))


def arrange(rng: random.Random, metadata: dict) -> Scene:
    """A random scene that satisfies `metadata` (any of the grammar's prompts)."""
    include = metadata["include"]
    free = [c for c in COLORS if c not in [item.get("color") for item in include]]
    rng.shuffle(free)
    kinds = []
    for item in include:
        # Objects of one class share a color; different classes never do.
        kinds += [(item["class"], item.get("color") or free.pop())] * item["count"]
    relation = next((item["position"][0] for item in include if "position" in item), None)
    boxes = _place(rng, len(kinds), relation)
    objects = tuple(SceneObject(*kind, *box) for kind, box in zip(kinds, boxes, strict=True))
    # A copy: the grammar's entries are shared by all scenes.
    return Scene(objects, metadata["tag"], metadata["prompt"], copy.deepcopy(metadata))


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image of `size` x `size` px, anti-aliased."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    for item in scene.objects:
        x0, y0, x1, y1 = (round(edge * size / UNITS) for edge in item.box)
        image.paste(PALETTE[item.color], (x0, y0), shape_mask(item.shape, x1 - x0, y1 - y0))
    return image


@lru_cache(maxsize=4096)
def shape_mask(shape: str, width: int, height: int) -> Image.Image:
    """Coverage (mode "L", 0..255) of a shape that fills a box of `width` x `height` px."""
    big = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    mask = Image.new("L", big)
    draw = ImageDraw.Draw(mask)
    for outline, value in zip(_outlines(shape), (255, 0), strict=False):
        # PIL draws the pixel at a vertex: the far edge is one sample inside the box.
        draw.polygon([(x * (big[0] - 1), y * (big[1] - 1)) for x, y in outline], fill=value)
    return mask.resize((width, height), Image.Resampling.BOX)


@lru_cache
def _outlines(shape: str) -> tuple[Outline, ...]:
    """A shape's outline, then its hole's if it has one, as points in the unit box (y down)."""
    turn = [2 * math.pi * i / 180 for i in range(180)]
    disc = tuple((0.5 + math.cos(t) / 2, 0.5 + math.sin(t) / 2) for t in turn)
    if shape == "circle":
        return (disc,)
    if shape == "ring":
        return disc, tuple((0.5 + (x - 0.5) * 0.5, 0.5 + (y - 0.5) * 0.5) for x, y in disc)
    if shape == "heart":
        xs = [16 * math.sin(t) ** 3 for t in turn]
        ys = [-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) for t in turn]
        return (_fill_box(list(zip(xs, ys, strict=True))),)
    if shape == "star":
        spokes = [(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.45) for i in range(10)]
        return (_fill_box([(r * math.sin(t), -r * math.cos(t)) for t, r in spokes]),)
    return (_POLYGONS[shape],)


def _fill_box(points: list[tuple[float, float]]) -> Outline:
    """Stretch an outline so that it touches all four sides of the unit box."""
    xs, ys = zip(*points, strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return tuple(((x - min(xs)) / width, (y - min(ys)) / height) for x, y in points)


def _place(rng: random.Random, count: int, relation: str | None) -> list[tuple[int, int, int]]:
    """Random boxes (x, y, even size) at least `GAP` apart, box 1 in `relation` to box 0."""
    low, high = SIZES[count]
    for _ in range(10_000):
        boxes: list[tuple[int, int, int]] = []
        for _ in range(count):
            size = rng.randrange(low, high + 1, 2)
            reach = MARGIN + size // 2
            box = (rng.randint(reach, UNITS - reach), rng.randint(reach, UNITS - reach), size)
            if any(_too_close(box, other) for other in boxes):
                break
            boxes.append(box)
        if len(boxes) == count and (relation is None or _clearly(relation, boxes[1], boxes[0])):
            return boxes
    raise AssertionError(f"no room for {count} objects ({relation})")


def _too_close(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) < (a[2] + b[2]) // 2 + GAP


def _clearly(relation: str, a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether `a` is unambiguously in `relation` to `b`.

    GenEval's judge subtracts a tenth of the summed sizes and requires a component above 0.5 of the
    unit offset; here it is at least 0.6, and the other direction's at most 0.4.
    """
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = {
        "left of": (-dx, dy),
        "right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    distance = math.hypot(dx, dy)
    return along - 0.1 * (a[2] + b[2]) >= 0.6 * distance and abs(across) <= 0.4 * distance


CLASSES = tuple(
    (shape, color)
    for shape in ("circle", "square", "triangle", "cross")
    for color in tuple(PALETTE)[:5]
)
"""Shape and color of each class id, for class-conditional models."""


def class_image(label: int, number: int, size: int, seed: int) -> Image.Image:
    """Image `number` of a class, `size` pixels wide: its shape at a random place and size."""
    dice = random.Random(f"class shapes {seed} {label} {number}")
    side = dice.randrange(24, 34, 2)
    reach = MARGIN + side // 2
    x, y = (dice.randint(reach, UNITS - reach) for _ in range(2))
    return render(Scene((SceneObject(*CLASSES[label], x, y, side),), "single", "", {}), size)

"""The shapes world's language: GenEval's prompt grammar over eight shapes and eight colours.

Metadata and prompts follow `prompts/create_prompts.py` and `evaluation_metadata.jsonl` of
djghosh13/geneval: keys in the order tag, include, exclude (counting only), prompt; in a position
prompt `include[0]` is the reference object and `include[1]` stands in the relation to it.

Held-out convention: a fifth of all `position` and `color_attr` prompts (by CRC-32 of the prompt)
is never drawn for training scenes, and `benchmark_prompts` draws these two tags from that fifth
only. The other four tags have few prompts (8, 56, 24 and 64), which training and benchmark share:
there the benchmark asks for new images of known prompts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import lru_cache

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
# Eight of GenEval's ten colours: white is lost on a light background, and brown is what an
# autoencoder makes of the edge between orange and black.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_TAGS = ("position", "color_attr")
HELD_OUT_FRACTION = 5  # one prompt in five


def with_article(noun: str) -> str:
    """`noun` with "a" or "an", by its first letter."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """GenEval's plural: "es" after s, "s" otherwise."""
    return f"{noun}es" if noun[-1] == "s" else f"{noun}s"


def is_held_out(metadata: dict) -> bool:
    """True for a prompt that training scenes never show (see the module docstring)."""
    held_out = zlib.crc32(metadata["prompt"].encode()) % HELD_OUT_FRACTION == 0
    return metadata["tag"] in HELD_OUT_TAGS and held_out


def single_object(shape: str) -> dict:
    """Metadata of "a photo of a circle"."""
    return _metadata("single_object", [_item(shape)], with_article(shape))


def two_object(first: str, second: str) -> dict:
    """Metadata of "a photo of a circle and a ring"."""
    phrase = f"{with_article(first)} and {with_article(second)}"
    return _metadata("two_object", [_item(first), _item(second)], phrase)


def counting(shape: str, count: int) -> dict:
    """Metadata of "a photo of three circles"; exactly three, by `exclude`."""
    phrase = f"{NUMBER_WORDS[count]} {plural(shape)}"
    return _metadata("counting", [_item(shape, count)], phrase, exclude=[_item(shape, count + 1)])


def colors(shape: str, color: str) -> dict:
    """Metadata of "a photo of a red circle"."""
    return _metadata("colors", [_item(shape, color=color)], f"{with_article(color)} {shape}")


def position(shape: str, relation: str, reference: str) -> dict:
    """Metadata of "a photo of a circle left of a ring": shape, relation, reference."""
    include = [_item(reference), _item(shape) | {"position": [relation, 0]}]
    phrase = f"{with_article(shape)} {relation} {with_article(reference)}"
    return _metadata("position", include, phrase)


def color_attr(first: str, first_color: str, second: str, second_color: str) -> dict:
    """Metadata of "a photo of a red circle and a blue ring"."""
    include = [_item(first, color=first_color), _item(second, color=second_color)]
    phrase = f"{with_article(first_color)} {first} and {with_article(second_color)} {second}"
    return _metadata("color_attr", include, phrase)


@lru_cache
def training_prompts(tag: str) -> tuple[dict, ...]:
    """The prompts of `tag` that training scenes may show."""
    return tuple(metadata for metadata in all_prompts(tag) if not is_held_out(metadata))


def benchmark_prompts(seed: int, per_tag: int, tags: Sequence[str] = TAGS) -> list[dict]:
    """`per_tag` prompts of every tag, tag by tag, as GenEval metadata.

    Prompts are unique while the grammar lasts; a tag with fewer than `per_tag` prompts is gone
    through again in a new order, so that every tag has the same number of entries.
    """
    chosen: list[dict] = []
    for tag in tags:
        rng = random.Random(f"shapes benchmark {seed} {tag}")
        pool = [m for m in all_prompts(tag) if tag not in HELD_OUT_TAGS or is_held_out(m)]
        drawn: list[dict] = []
        while len(drawn) < per_tag:
            drawn += rng.sample(pool, len(pool))
        chosen += drawn[:per_tag]
    return chosen


def all_prompts(tag: str) -> list[dict]:
    """Every prompt of `tag` that the grammar can make, in a fixed order."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    color_pairs = [(a, b) for a in COLORS for b in COLORS if a != b]
    if tag == "single_object":
        return [single_object(s) for s in SHAPES]
    if tag == "two_object":
        return [two_object(a, b) for a, b in pairs]
    if tag == "counting":
        return [counting(s, n) for s in SHAPES for n in NUMBER_WORDS]
    if tag == "colors":
        return [colors(s, c) for s in SHAPES for c in COLORS]
    if tag == "position":
        return [position(a, r, b) for a, b in pairs for r in RELATIONS]
    if tag == "color_attr":
        return [color_attr(a, ca, b, cb) for a, b in pairs for ca, cb in color_pairs]
    raise ValueError(f"unknown tag {tag!r}: choose from {', '.join(TAGS)}")


def _item(shape: str, count: int = 1, color: str | None = None) -> dict:
    item: dict = {"class": shape, "count": count}
    return item if color is None else item | {"color": color}


def _metadata(
    tag: str, include: list[dict], phrase: str, exclude: list[dict] | None = None
) -> dict:
    excluded = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **excluded, "prompt": f"a photo of {phrase}"}

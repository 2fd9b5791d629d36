"""The shapes world's language: GenEval's prompt grammar over eight shapes and eight colors.

Held-out prompts: a fifth of all `position` and `color_attr` prompts (chosen by the CRC-32 of the
prompt) never occurs in training scenes, and `benchmark_prompts` uses only that fifth for these two
tags. The other four tags have few prompts (8, 56, 24 and 64), which training and benchmark share:
for them the benchmark asks for new images of known prompts.
"""

from __future__ import annotations

import random
import zlib
from functools import lru_cache

from geneval.prompts import (
    NUMBER_WORDS,
    RELATIONS,
    TAGS,
    color_attr,
    colors,
    counting,
    position,
    single_object,
    two_object,
)

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
# Eight of GenEval's ten colors: white is invisible on a light background, and autoencoders turn the
# edge between orange and black into brown.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
HELD_OUT_TAGS = ("position", "color_attr")
HELD_OUT_FRACTION = 5  # one prompt in five


def is_held_out(metadata: dict) -> bool:
    """True for a prompt that training scenes never show (see the module docstring)."""
    held_out = zlib.crc32(metadata["prompt"].encode()) % HELD_OUT_FRACTION == 0
    return metadata["tag"] in HELD_OUT_TAGS and held_out


@lru_cache
def training_prompts(tag: str) -> tuple[dict, ...]:
    """The prompts of `tag` that training scenes may show."""
    return tuple(metadata for metadata in all_prompts(tag) if not is_held_out(metadata))


def benchmark_prompts(seed: int = 0, per_tag: int = 20) -> list[dict]:
    """`per_tag` prompts of every tag, tag by tag, as GenEval metadata.

    A prompt occurs again only once its tag has no others left: a tag with fewer than `per_tag`
    prompts repeats them in a new order, so that every tag has the same number of entries.
    """
    chosen: list[dict] = []
    for tag in TAGS:
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
    assert tag == "color_attr", tag
    return [color_attr(a, ca, b, cb) for a, b in pairs for ca, cb in color_pairs]


def every_prompt() -> list[dict]:
    """Every prompt of every tag, in a fixed order."""
    return [entry for tag in TAGS for entry in all_prompts(tag)]

"""GenEval's grammar and its 553 prompts, which are generated here instead of copied.

Reference: `prompts/create_prompts.py` of djghosh13/geneval (MIT, (c) 2023 Dhruba Ghosh). The tests
compare the result with the SHA-256 of both official files (tests/test_geneval_prompts.py). The six
tasks, in the order of `TAGS`, draw from one stream, `numpy.random.default_rng(43)`. Duplicates are
dropped at the end and not redrawn, so three tasks have 99, 80 and 94 prompts instead of 100. An
entry's index in the list is the number of its folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from geneval.object_names import OBJECT_NAMES
from geneval.rules import COLORS, RELATIONS

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
"""The numbers of objects that a counting prompt may ask for."""
OFFICIAL_SEED = 43
OFFICIAL_PER_TASK = 100
# The two tasks with colors leave out the first of the names, "person".
_NEVER_COLORED = 1
assert OBJECT_NAMES[0] == "person"


# -- the grammar -----------------------------------------------------------------------------------
def with_article(noun: str) -> str:
    """`noun` with "a" or "an", depending on its first letter."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """GenEval's plural: "es" after s, "s" otherwise."""
    return f"{noun}es" if noun[-1] == "s" else f"{noun}s"


def wanted(name: str, count: int = 1, color: str | None = None) -> dict:
    """An item for an entry's `include` or `exclude`."""
    item: dict = {"class": name, "count": count}
    return item if color is None else item | {"color": color}


def entry_of(tag: str, include: list[dict], phrase: str, exclude: list[dict] | None = None) -> dict:
    """Metadata of "a photo of {phrase}", with GenEval's keys in GenEval's order."""
    excluded = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **excluded, "prompt": f"a photo of {phrase}"}


def single_object(name: str) -> dict:
    """Metadata of "a photo of a dog"."""
    return entry_of("single_object", [wanted(name)], with_article(name))


def two_object(first: str, second: str) -> dict:
    """Metadata of "a photo of a dog and a bench"."""
    phrase = f"{with_article(first)} and {with_article(second)}"
    return entry_of("two_object", [wanted(first), wanted(second)], phrase)


def counting(name: str, count: int) -> dict:
    """Metadata of "a photo of three dogs"; `exclude` rules out a fourth."""
    phrase = f"{NUMBER_WORDS[count]} {plural(name)}"
    return entry_of("counting", [wanted(name, count)], phrase, exclude=[wanted(name, count + 1)])


def colors(name: str, color: str) -> dict:
    """Metadata of "a photo of a red bus"."""
    return entry_of("colors", [wanted(name, color=color)], f"{with_article(color)} {name}")


def position(name: str, relation: str, reference: str) -> dict:
    """Metadata of "a photo of a dog left of a bench"; the reference is `include[0]`."""
    include = [wanted(reference), wanted(name) | {"position": [relation, 0]}]
    phrase = f"{with_article(name)} {relation} {with_article(reference)}"
    return entry_of("position", include, phrase)


def color_attr(first: str, first_color: str, second: str, second_color: str) -> dict:
    """Metadata of "a photo of a red bus and a blue bench"."""
    include = [wanted(first, color=first_color), wanted(second, color=second_color)]
    phrase = f"{with_article(first_color)} {first} and {with_article(second_color)} {second}"
    return entry_of("color_attr", include, phrase)


# -- the official prompts --------------------------------------------------------------------------
def official_prompts() -> list[dict]:
    """The 553 entries of `evaluation_metadata.jsonl`, in its order; a new copy for each call."""
    return [json.loads(line) for line in _official_lines()]


@lru_cache
def _official_lines() -> tuple[str, ...]:
    return tuple(metadata_line(entry) for entry in draw_prompts(OFFICIAL_SEED, OFFICIAL_PER_TASK))


def draw_prompts(seed: int, per_task: int) -> list[dict]:
    """Metadata as the official generator draws it for this seed, without duplicates.

    All 80 single objects, then `per_task` prompts for each other task. Entries have the keys tag,
    include, exclude (counting only) and prompt.
    """
    rng = np.random.default_rng(seed)
    drawn = [single_object(name) for name in _objects(rng, len(OBJECT_NAMES))]
    draw = {
        "two_object": _two_object,
        "counting": _counting,
        "colors": _colors,
        "position": _position,
        "color_attr": _color_attr,
    }
    assert ("single_object", *draw) == TAGS
    for draw_one in draw.values():
        drawn += [draw_one(rng) for _ in range(per_task)]
    return list({metadata_line(entry): entry for entry in drawn}.values())


def metadata_line(entry: dict) -> str:
    """The entry as a line of `evaluation_metadata.jsonl` or `metadata.jsonl`, without newline."""
    return json.dumps(entry)


def _objects(rng: np.random.Generator, count: int, first: int = 0) -> list[str]:
    """`count` different object names, leaving out the first `first` of `OBJECT_NAMES`."""
    chosen = rng.choice(len(OBJECT_NAMES) - first, size=count, replace=False)
    return [OBJECT_NAMES[first + index] for index in chosen]


def _one_of(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[rng.choice(len(names))]


def _two_object(rng: np.random.Generator) -> dict:
    return two_object(*_objects(rng, 2))


def _counting(rng: np.random.Generator) -> dict:
    name = _one_of(rng, OBJECT_NAMES)
    return counting(name, int(rng.integers(min(NUMBER_WORDS), max(NUMBER_WORDS), endpoint=True)))


def _colors(rng: np.random.Generator) -> dict:
    name = _one_of(rng, OBJECT_NAMES[_NEVER_COLORED:])
    return colors(name, _one_of(rng, COLORS))


def _position(rng: np.random.Generator) -> dict:
    first, second = _objects(rng, 2)
    return position(first, _one_of(rng, RELATIONS), second)


def _color_attr(rng: np.random.Generator) -> dict:
    first, second = _objects(rng, 2, first=_NEVER_COLORED)
    first_color, second_color = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    return color_attr(first, first_color, second, second_color)

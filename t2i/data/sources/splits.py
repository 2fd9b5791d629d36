"""Which split of a data set the name of a folder or file means."""

import re
from collections.abc import Iterable

_SPLITS = ("train", "validation", "test", "dev", "eval")
_SAME = {
    "training": "train",
    **dict.fromkeys(("validate", "valid", "val"), "validation"),
    "testing": "test",
}
"""Synonyms."""


def split_named(word: str) -> str | None:
    """The split that a word means; None if it means none."""
    split = _SAME.get(word.lower(), word.lower())
    return split if split in _SPLITS else None


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name means: train, Training, train2017, but not train_station."""
    return split_named(re.sub(r"[\d_.-]+$", "", name))


def mentions_split(name: str) -> str | None:
    """The first split that a word of a folder's name means: test_images, seg_train, trainset."""
    words = (word.lower().removesuffix("set") for word in re.findall("[A-Z]?[a-z]+", name))
    return next(filter(None, map(split_named, words)), None)


def splits_in(path: str) -> set[str]:
    """The splits that words of a path mean, as in data/train-00000-of-00002.parquet."""
    return {split for word in re.findall("[a-z]+", path.lower()) if (split := split_named(word))}


def same_split(split: str, wanted: str) -> bool:
    """Whether a split is the wanted one, which may be given by a synonym."""
    return split == (split_named(wanted) or wanted.lower())


def folders_of(split: str, names: Iterable[str]) -> list[str]:
    """The folder with exactly the split's name, or else all whose names mean this split."""
    exact = [name for name in sorted(names) if name.lower() == split.lower()]
    named = [(name, split_of_folder(name)) for name in sorted(names)]
    return exact[:1] or [name for name, own in named if own and same_split(own, split)]

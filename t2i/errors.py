"""How the kit tells a user's mistake from a bug of its own, and what messages have in common."""

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Something that the caller gave cannot be used: what was given, what is allowed, what to do.

    Programs end in its message alone, which says all; docstrings name it where it matters when it
    comes. Every other exception is taken for a bug and keeps its traceback.
    """


class NotFiniteError(UserError, FloatingPointError):
    """A training run's loss, gradient or weights are no numbers: its settings cannot be used."""


class Stopped(KeyboardInterrupt):
    """A training run was stopped on request, and has saved."""


def choose_one(name: object, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not: the nearest one, and all of them."""
    known = list(names)
    nearest = get_close_matches(str(name), known, 1)
    perhaps = f"perhaps you meant {nearest[0]}; " if nearest else ""
    return f"{perhaps}choose one of {', '.join(known)}"


def nearest_path(path: str | Path) -> str:
    """The end of a message about a path that there is not: what it may have meant; or nothing."""
    home = os.path.expanduser(path)  # which a shell does, and Python does not
    if str(path).startswith("~") and os.path.exists(home):
        return f"; perhaps you meant {home}"
    there, rest = Path(path), list[str]()
    while not there.exists() and there != there.parent:
        there, rest = there.parent, [there.name, *rest]
    names = os.listdir(there) if rest and there.is_dir() and os.access(there, os.R_OK) else []
    found = get_close_matches(rest[0], names, 1) if rest else []
    if not found:
        return ""
    meant = there.joinpath(found[0], *rest[1:])
    return f"; perhaps you meant {meant if meant.exists() else there / found[0]}"


def shorten(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more

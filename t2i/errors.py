"""How the kit tells a user's mistake from a bug of its own, and what messages have in common."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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


def shorten(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more

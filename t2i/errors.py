"""Exceptions that tell a user's mistake from a bug in the kit, and helpers for error messages."""

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

ONE_OBJECT = 'each line must be one whole object, such as {"name": "a value"}'
"""Advice about .jsonl files."""


class UserError(ValueError):
    """The caller's input cannot be used. Says what was given, what is allowed and what to do.

    Programs print only the message and exit. Docstrings mention it where callers need to know. All
    other exceptions count as bugs and keep their traceback.
    """


class NotFiniteError(UserError, FloatingPointError):
    """A loss, gradient, weight or logit is not finite: its settings cannot be used."""


class Stopped(KeyboardInterrupt):
    """A training run was stopped on request, after saving a checkpoint."""


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Put a file's path, or another place, in front of a UserError's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def choose_one(name: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known name, and all known names."""
    known = list(names)
    nearest = get_close_matches(str(name), known, 1)
    perhaps = f"perhaps you meant {nearest[0]}; " if nearest else ""
    return f"{perhaps}choose one of {', '.join(known)}"


def nearest_path(path: str | Path) -> str:
    """The end of a message about a missing path: the path that may be meant, or its broken link."""
    if lost := broken_link(path):
        return f"; {lost}"
    home = os.path.expanduser(path)  # shells expand ~, Python does not
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


def check_text(text: str, what: str) -> None:
    """UserError for text that UTF-8 cannot encode, and so no file can hold; `what` has it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        known = sys.getfilesystemencoding()
        if known != "utf-8":  # then non-ASCII arguments arrive as surrogates
            raise UserError(
                f"{what}: {text!r:.200} is not text in {known}, the encoding of this shell's locale; "
                "start again with PYTHONUTF8=1, or after export LC_ALL=C.UTF-8"
            ) from error
        raise UserError(
            f"{what}: {text!r:.200} contains a lone surrogate ({text[error.start]!r}), which is not a "
            "character; remove it (in the name of a file: rename the file)"
        ) from error


def is_utf16(content: bytes) -> bool:
    """Whether text begins as Windows' programs begin UTF-16 ("Unicode")."""
    return content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def refuse_utf16(content: bytes, what: str | Path) -> None:
    """UserError for a file in UTF-16, which other checks would call damaged."""
    if is_utf16(content):
        raise UserError(
            f"{what} is UTF-16, not UTF-8: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"
        )


def not_json(where: str, error: Exception) -> UserError:
    """The error about a line of a .jsonl file."""
    advice = f"; {ONE_OBJECT}" if isinstance(error, json.JSONDecodeError) else ""
    return UserError(f"{where} is not JSON: {error}{advice}")


def broken_link(path: str | Path) -> str:
    """What is wrong with a path that leads through a link to nothing; "" if it does not."""
    for there in (Path(path), *Path(path).parents):
        if there.is_symlink() and not there.exists():
            return f"{there} is a link to {os.readlink(there)}, which does not exist"
    return ""


def no_folder(path: str | Path) -> str:
    """What is wrong with a path that should be a folder and is not."""
    return "is a file, not a folder" if os.path.exists(path) else "does not exist"


def shorten(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more

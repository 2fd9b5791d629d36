"""What images depend on: written beside them before the first one, and compared before another is
added.

So a folder (or an .npz) of images is of one model, one seed and one way to sample, or it is refused
by name.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from t2i.errors import UserError
from t2i.files import read_json, writable_folder, write_json

_HASH = re.compile(r"[0-9a-f]{64}")


def claim(
    record: Path, settings: dict, *, images: Path, compared: set[str], occupied: bool
) -> None:
    """Record the settings of new images; refuse to mix them with others.

    Args:
        record: the file that holds the settings.
        images: the folder or file of the images, for messages.
        compared: the keys of the settings that images depend on; others are only recorded.
        occupied: whether there are images, or anything else, in the place already.

    Raises:
        UserError: the place holds images of other settings, or of unknown ones; it cannot be read
            or written.
    """
    before = read_json(record) if record.is_file() else None
    if before is None and occupied:
        raise UserError(
            f"{images} holds files without {record.name}, so nobody can say how they were drawn; "
            "give another --out"
        )
    if before is None:
        writable_folder(record.parent)
        write_json(record, settings)
    else:
        refuse_others(before, settings, images=images, compared=compared)


def refuse_others(before: object, now: dict, *, images: Path, compared: set[str]) -> None:
    """UserError names what differs between recorded settings and those of now, among the keys that
    are compared.
    """
    known = before if isinstance(before, dict) else {}
    there, here = (dict(_flat({k: d.get(k) for k in compared})) for d in (known, now))
    changes = [
        f"{key} {_shown(there.get(key))} there, {_shown(here.get(key))} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if any(change.startswith("weights.") for change in changes):
        changes.insert(0, f"{_who(known)} there, {_who(now)} now")
    if changes:
        raise UserError(
            f"{images} holds images drawn otherwise ({'; '.join(changes)}); give another --out, or delete it"
        )


def _who(settings: dict) -> str:
    """The model, as its program recorded it."""
    about = settings.get("about", {})
    return about.get("checkpoint") or about.get("backbone", {}).get("weights") or "another model"


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of nested settings, as JSON would give them back."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    return value[:8] if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)

"""Folders and files that one program at a time writes to, and what killed ones left in them."""

import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from t2i.errors import UserError
from t2i.files import saving, writable_folder

_LOCK, _OWNER = ".lock", ".owner.json"
_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.tmp")
"""Temporary names of `t2i.files.replacing`."""
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Those to which safetensors 0.8 writes first."""


@contextmanager
def owning(folder: str | Path, what: str, name: str = "") -> Iterator[None]:
    """Hold a folder, or a file in it, for one program at a time.

    The lock is released when the process ends, however it ends. Its file is removed again if
    nothing else is new in the folder, as is a folder that was created for it.

    Args:
        what: the kind of thing held, for the message: "run folder", ...
        name: the file's name; if empty, the whole folder is held.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    made = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    folder = writable_folder(folder)
    before = set(os.listdir(folder))
    held = f".{name}" if name else ""
    lock, owner = FileLock(folder / f"{held}{_LOCK}", timeout=0), folder / f"{held}{_OWNER}"
    try:
        with saving(folder):  # the lock file may belong to another user
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{what} {folder / name} is in use by {_owner(owner)}: "
            "wait for it to end, or choose another place"
        ) from error
    try:
        with saving(owner):
            owner.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        left = set(os.listdir(folder)) if folder.is_dir() else before
        if left - before == {Path(lock.lock_file).name}:
            Path(lock.lock_file).unlink()
            with suppress(OSError):  # a parent that is not empty
                for path in made:
                    path.rmdir()
        lock.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or just removed
        return "another process"


def remove_leftovers(folder: str | Path, before: float = math.inf) -> None:
    """Remove the temporary files that killed processes left below a folder, if older than `before`
    (seconds since the epoch). Only its owner may call it; folders in it that others own stay.
    """
    for place, folders, names in os.walk(folder):
        if _OWNER in names and not os.path.samefile(place, folder):
            folders.clear()
            continue
        if left := list(filter(_LEFTOVER.fullmatch, names)):
            left += filter(_SAFETENSORS.fullmatch, names)
        for path in (Path(place, name) for name in left):
            with suppress(FileNotFoundError):  # another process has just finished it
                if path.stat().st_mtime < before:
                    path.unlink()

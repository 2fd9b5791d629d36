"""Detects files that Git LFS has not fetched: it leaves a short pointer file instead."""

from contextlib import suppress
from pathlib import Path

from t2i.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer file."""


def refuse_pointers(*paths: Path) -> None:
    """UserError if one is a Git LFS pointer; call it after failing to read one of these files."""
    for path in paths:
        with suppress(OSError, ValueError), path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                break
    else:
        return
    raise UserError(
        f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there, or download the file"
    )

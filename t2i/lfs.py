"""Files that Git LFS has not fetched: in their place lies a note of a few lines."""

from contextlib import suppress
from pathlib import Path

from t2i.errors import UserError

LFS_POINTER = b"version https://git-lfs"
"""How the note begins that Git LFS puts in a file's place until the file is fetched."""


def refuse_pointers(*paths: Path) -> None:
    """UserError names files that Git LFS has not fetched; to be asked where one cannot be read."""
    for path in paths:
        with suppress(OSError, ValueError), path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                break
    else:
        return
    raise UserError(
        f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there, or download the file"
    )

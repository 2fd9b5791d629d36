"""Hashes of what a data set contains: equal for a copy elsewhere, different after any edit.

Hashing reads every byte once. The hashes are kept in an index next to the caches, so that the next
run only checks the sizes and times of files.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t2i.errors import shorten
from t2i.files import file_sha256, refuse_passing, text_sha256
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar
from t2i.published import KnownHashes, file_status

Contents = list[tuple[str, str]]
"""(name, hash) of each file, in data set order; `ABSENT` is the hash of an unreadable one."""

ABSENT = "absent"
_WORTH_AN_INDEX = 64 << 20  # bytes; hashing less takes only a moment
_SAVE_SECONDS = 60
_THREADS, _AT_ONCE = 8, 256
_DIGITS = 16


def hash_files(
    files: Sequence[tuple[str, Path]], cache_dir: Path, processes: Processes = ALONE
) -> Contents:
    """Hash the files of a data set, each given as (name in the data set, path).

    Only the main process reads the files of a large set; the others wait for its index.

    Raises:
        TimeoutError: the main process stopped.
    """
    statuses = _statuses(files)
    place = _index_path(files, cache_dir) if _bytes(statuses) >= _WORTH_AN_INDEX else None
    if place is not None and not processes.is_main:
        hashes = _wait_for_index(place, statuses, processes)
    else:
        hashes = _hash_new(place, statuses, quiet=not processes.is_main)
    return [(name, hashes.get(path, ABSENT)) for name, path in files]


def worth_an_index(files: Sequence[tuple[str, Path]]) -> bool:
    """Whether the files are large enough for `hash_files` to keep their hashes in an index."""
    return _bytes(_statuses(files)) >= _WORTH_AN_INDEX


def _statuses(files: Sequence[tuple[str, Path]]) -> dict[Path, list[int]]:
    """The status of each file that exists."""
    found = ((path, file_status(path)) for _, path in files)
    return {path: status for path, status in found if status is not None}


def _bytes(statuses: dict[Path, list[int]]) -> int:
    return sum(size for size, *_ in statuses.values())


def contents_key(contents: Contents) -> str:
    """One hash of all files, in their order."""
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def content_key(parts: dict) -> str:
    """A name for JSON-able parts: 20 hexadecimal digits of the SHA-256 of their JSON."""
    return text_sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")))[:20]


def describe_changes(before: Iterable[tuple[str, str]], after: Contents) -> str:
    """The differences in words; empty if there are none."""
    before = list(before)
    # A list may name images that are not there.
    old, new = ({k: v for k, v in files if v != ABSENT} for files in (before, after))
    both = old.keys() & new.keys()
    parts = {
        "edited": [name for name in old if name in both and old[name] != new[name]],
        "added": [name for name in new if name not in both],
        "removed": [name for name in old if name not in both],
    }
    changes = [_count(names, what) for what, names in parts.items() if names]
    if not changes and [name for name, _ in before] != [name for name, _ in after]:
        changes = ["the order of the files has changed"]
    return ", ".join(changes)


def changes_since(files: Sequence[tuple[str, Path]], contents: Contents, cache_dir: Path) -> str:
    """How the files differ now from `contents`, in words. Reads a large set's changed files only,
    thanks to the index.
    """
    after = zip(hash_files(files, cache_dir), contents, strict=True)
    return describe_changes(contents, [new for new, old in after if new[1] != ABSENT or new == old])


def _count(names: list[str], what: str) -> str:
    verb = "file was" if len(names) == 1 else "files were"
    return f"{len(names)} {verb} {what} ({shorten([*map(printable, names)], most=3)})"


def printable(text: str) -> str:
    """The text with line breaks, and bytes that are not UTF-8, escaped: safe to print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_in(folder: Path, path: Path) -> str:
    """A file's path relative to the folder that it is in, safe to print."""
    return printable(str(path.relative_to(folder)))


def _index_path(files: Sequence[tuple[str, Path]], cache_dir: Path) -> Path | None:
    """The file that keeps the hashes of these files; None if it cannot be written."""
    first = os.fsencode(os.path.abspath(files[0][1].parent))
    folder = Path(cache_dir) / "file_hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    writable = os.access(folder, os.W_OK)
    return folder / f"{hashlib.sha256(first).hexdigest()[:20]}.json" if writable else None


def _hash_new(place: Path | None, statuses: dict[Path, list[int]], quiet: bool) -> dict[Path, str]:
    """Hash the files that the index does not know, and add them to the index."""
    # The index keeps entries of other files: another data set in this folder may need them.
    known, seen, saved = KnownHashes(place), time.time_ns(), time.monotonic()
    hashes = {path: known.get(path, status) for path, status in statuses.items()}
    new = [path for path, digest in hashes.items() if digest is None]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress_bar(
            total=len(new), desc="reading", unit=" files", disable=quiet or place is None
        ) as bar,
    ):
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            for path, digest in zip(part, pool.map(_hash, part), strict=True):
                hashes[path] = digest
                known.put(path, statuses[path], seen, digest)
            bar.update(len(part))
            if time.monotonic() - saved > _SAVE_SECONDS:  # a killed run resumes from here
                known.save()
                saved = time.monotonic()
    if new:
        known.save()
    return {path: digest for path, digest in hashes.items() if digest is not None}


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)[:_DIGITS] if path.is_file() else ABSENT
    except (OSError, ValueError) as error:
        refuse_passing(path, error)
        return ABSENT


def _wait_for_index(
    place: Path, statuses: dict[Path, list[int]], processes: Processes
) -> dict[Path, str]:
    """Wait until the main process has put the hash of every file into the index; return them."""
    found: dict[Path, str] = {}

    def missing() -> list[Path]:
        known = KnownHashes(place)
        for path, status in statuses.items():
            if (digest := known.get(path, status, just_now=True)) is not None:
                found[path] = digest
        return [path for path in statuses if path not in found]

    processes.wait_until_none(missing, f"the hashes in {place} of ")
    return found

"""What a data set contains, as hashes: the same for a copy elsewhere, another for any edit.

Hashing reads every byte once. What was found is kept in an index beside the caches, so that the
next run only asks the file system.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t2i.files import file_sha256, text_sha256, wait_until_none
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar
from t2i.published import KnownHashes, file_status

Contents = list[tuple[str, str]]
"""(name, hash) of each file, in the order of the data set; `ABSENT` for one that cannot be read."""

ABSENT = "absent"
_WORTH_AN_INDEX = 64 << 20  # bytes: less is hashed in a moment
_SAVE_SECONDS = 60
_THREADS, _AT_ONCE = 8, 256
_DIGITS = 16
_NAMED = 3


def hash_files(
    files: Sequence[tuple[str, Path]],
    cache_dir: Path,
    processes: Processes = ALONE,
) -> Contents:
    """Hash the files of a data set, each given with its name there.

    Of several processes the main one reads them; the others wait for its index.

    Raises:
        TimeoutError: the main process stopped.
    """
    statuses = _statuses(files)
    place = _index_path(files, cache_dir) if _bytes(statuses) >= _WORTH_AN_INDEX else None
    if place is not None and not processes.is_main:
        hashes = _wait_for_index(place, statuses, processes.patience)
    else:
        hashes = _hash_new(place, statuses, quiet=not processes.is_main)
    return [(name, hashes.get(path, ABSENT)) for name, path in files]


def worth_an_index(files: Sequence[tuple[str, Path]]) -> bool:
    """Whether so much is to be hashed that `hash_files` keeps what it finds."""
    return _bytes(_statuses(files)) >= _WORTH_AN_INDEX


def _statuses(files: Sequence[tuple[str, Path]]) -> dict[Path, list[int]]:
    """Of the files that are there."""
    found = ((path, file_status(path)) for _, path in files)
    return {path: status for path, status in found if status is not None}


def _bytes(statuses: dict[Path, list[int]]) -> int:
    return sum(size for size, *_ in statuses.values())


def contents_key(contents: Contents) -> str:
    """One hash for all of them, in their order."""
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def content_key(parts: dict) -> str:
    """A name for what JSON-able parts say: 20 hexadecimal digits of the SHA-256 of their JSON."""
    return text_sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")))[:20]


def describe_changes(before: Iterable[tuple[str, str]], after: Contents) -> str:
    """What is different, in words; empty if nothing is."""
    old, new = dict(before), dict(after)
    both = old.keys() & new.keys()
    parts = {
        "edited": [name for name in old if name in both and old[name] != new[name]],
        "added": [name for name in new if name not in both],
        "removed": [name for name in old if name not in both],
    }
    said = [_count(names, what) for what, names in parts.items() if names]
    if not said and list(old) != list(new):
        said = ["the files stand in another order"]
    return ", ".join(said)


def states_of(files: Sequence[tuple[str, Path]]) -> list[int]:
    """What the file system says of each file, as a number, for `changed_since`."""
    return [hash(tuple(file_status(path) or ())) for _, path in files]


def changed_since(files: Sequence[tuple[str, Path]], states: list[int], contents: Contents) -> str:
    """How files differ, in words, from `contents` that were hashed after `states` were taken. Reads
    only those of another state.
    """
    known = zip(files, contents, states, states_of(files), strict=True)
    after = [
        (name, digest if before == now else _hash(path))
        for (_, path), (name, digest), before, now in known
    ]
    pairs = zip(after, contents, strict=True)
    return describe_changes(contents, [new for new, old in pairs if new[1] != ABSENT or new == old])


def _count(names: list[str], what: str) -> str:
    first = ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} {'file was' if len(names) == 1 else 'files were'} {what} ({first})"


def printable(text: str) -> str:
    """A name as it can be printed: line breaks, and bytes that are no UTF-8, are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_in(folder: Path, path: Path) -> str:
    """A file's path below a folder, as it can be printed."""
    return printable(str(path.relative_to(folder)))


def _index_path(files: Sequence[tuple[str, Path]], cache_dir: Path) -> Path | None:
    """Where the hashes of these files are kept; None where nothing can be written."""
    first = os.fsencode(os.path.abspath(files[0][1].parent))
    folder = Path(cache_dir) / "file_hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    writable = os.access(folder, os.W_OK)
    return folder / f"{hashlib.sha256(first).hexdigest()[:20]}.json" if writable else None


def _hash_new(place: Path | None, statuses: dict[Path, list[int]], quiet: bool) -> dict[Path, str]:
    """Hash what the index does not know, and bring the index up to date."""
    # Entries of other files may be those of another data set in this folder.
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
            if time.monotonic() - saved > _SAVE_SECONDS:  # a killed run goes on from here
                known.save()
                saved = time.monotonic()
    if new:
        known.save()
    return {path: digest for path, digest in hashes.items() if digest is not None}


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)[:_DIGITS] if path.is_file() else ABSENT
    except (OSError, ValueError):
        return ABSENT


def _wait_for_index(
    place: Path, statuses: dict[Path, list[int]], patience: float
) -> dict[Path, str]:
    """The hashes that the main process found."""
    found: dict[Path, str] = {}

    def missing() -> list[Path]:
        known = KnownHashes(place)
        for path, status in statuses.items():
            if (digest := known.get(path, status, just_now=True)) is not None:
                found[path] = digest
        return [path for path in statuses if path not in found]

    wait_until_none(missing, patience, f"the hashes in {place} of ")
    return found

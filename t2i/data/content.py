"""What a data set contains, as hashes: the same for a copy elsewhere, another for any edit.

Hashing reads every byte once. What was found is kept in an index beside the caches, with the size
and the times of each file, so that the next run only asks the file system. The change time is part
of it, since `cp -p` and `touch -r` can restore the others.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from t2i.errors import UserError
from t2i.files import file_sha256, text_sha256, wait_until_none, write_text
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar

Contents = list[tuple[str, str]]
"""(name, hash) of each file, in the order of the data set; `ABSENT` for one that cannot be read."""

ABSENT = "absent"
_WORTH_AN_INDEX = 64 << 20  # bytes: less is hashed in a moment
_RACY_NS = 2 * 10**9  # a file that changed so shortly before it was hashed may change again unseen
_SAVE_SECONDS = 60
_THREADS, _AT_ONCE = 8, 256
_DIGITS = 16
_NAMED = 3


def hash_files(
    files: Sequence[tuple[str, Path]],
    cache_dir: Path,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Contents:
    """Hash the files of a data set, each given with its name there.

    Of several processes the main one reads them; the others wait for its index.

    Raises:
        TimeoutError: the main process stopped.
    """
    found = ((path, _status(path)) for _, path in files)
    statuses = {path: status for path, status in found if status is not None}
    total = sum(size for size, *_ in statuses.values())
    place = _index_path(files, cache_dir) if total >= _WORTH_AN_INDEX else None
    if place is not None and not processes.is_main:
        hashes = _wait_for_index(place, statuses, processes.patience)
    else:
        hashes = _hash_new(place, statuses, quiet=not (progress and processes.is_main))
    return [(name, hashes.get(path, ABSENT)) for name, path in files]


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


def _status(path: Path) -> list[int] | None:
    """[size, modification time, change time]; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # gone, unreadable, or no possible name
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


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


def _read_index(place: Path | None) -> dict[str, list]:
    """{path: [size, modification time, change time, time of hashing, hash]}."""
    try:
        index = json.loads(place.read_text(encoding="utf-8")) if place else {}
    except (OSError, ValueError):  # none yet, or damaged: it is built again
        return {}
    return index if isinstance(index, dict) else {}


def _known(index: dict[str, list], path: Path, status: list[int]) -> list | None:
    entry = index.get(os.path.abspath(path))
    return entry if entry is not None and entry[:3] == status else None


def _hash_new(place: Path | None, statuses: dict[Path, list[int]], quiet: bool) -> dict[Path, str]:
    """Hash what the index does not know, and bring the index up to date."""
    index, known = _read_index(place), dict[Path, list]()
    for path, status in statuses.items():
        entry = _known(index, path, status)
        if entry is not None and entry[3] - status[2] > _RACY_NS:
            known[path] = entry
    new = [path for path in statuses if path not in known]
    saved = time.monotonic()
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress_bar(
            total=len(new), desc="reading", unit=" files", disable=quiet or place is None
        ) as bar,
    ):
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            for path, digest in zip(part, pool.map(_hash, part), strict=True):
                known[path] = [*statuses[path], time.time_ns(), digest]
            bar.update(len(part))
            if time.monotonic() - saved > _SAVE_SECONDS:  # a killed run goes on from here
                _write_index(place, index, known)
                saved = time.monotonic()
    if new:
        _write_index(place, index, known)
    return {path: entry[4] for path, entry in known.items()}


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)[:_DIGITS] if path.is_file() else ABSENT
    except (OSError, ValueError):
        return ABSENT


def _write_index(place: Path | None, index: dict[str, list], known: dict[Path, list]) -> None:
    """Add what is known; entries of other files may be those of another data set in this folder."""
    if place is not None:
        index |= {os.path.abspath(path): entry for path, entry in known.items()}
        with suppress(UserError):  # a full disk costs the index here; what matters is written later
            write_text(place, json.dumps(index))


def _wait_for_index(
    place: Path, statuses: dict[Path, list[int]], patience: float
) -> dict[Path, str]:
    """The hashes that the main process found."""
    found: dict[Path, str] = {}

    def missing() -> list[Path]:
        index = _read_index(place)
        for path, status in statuses.items():
            if (entry := _known(index, path, status)) is not None:
                found[path] = entry[4]
        return [path for path in statuses if path not in found]

    wait_until_none(missing, patience, f"the hashes in {place} of ")
    return found

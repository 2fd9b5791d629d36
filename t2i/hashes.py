"""SHA-256 of weight files: a file of gigabytes is read once, and its hash remembered in the user's
cache.

A remembered hash holds for a file of the same place, size, inode and times. The time of change
(ctime) cannot be set by a copying program, so a file that was overwritten is read again even if its
date was put back.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from t2i.errors import UserError
from t2i.files import file_sha256, write_json

_LARGE = 16 << 20  # bytes; smaller files are read faster than their entry
_SETTLED = 2 * 10**9  # nanoseconds; a younger file may change again within one tick of its clock


def cache_root() -> Path:
    """The folder of everything that is kept for the user: `T2I_CACHE`, or `~/.cache/t2i`."""
    return Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i")


def remembered_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex; a large file that has not changed since the
    last time is not read.
    """
    target = Path(path).resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name  # the hub's cache names large files by their hash
    started, identity = time.time_ns(), _identity(target)
    if identity["size"] < _LARGE:
        return file_sha256(target)
    name = hashlib.sha256(str(target).encode()).hexdigest()
    entry = cache_root() / "hashes" / f"{name[:32]}.json"
    known = _read(entry)
    if known.get("file") == identity and isinstance(known.get("sha256"), str):
        return known["sha256"]
    digest = file_sha256(target)
    settled = max(identity["mtime_ns"], identity["ctime_ns"]) < started - _SETTLED
    if settled and _identity(target) == identity:
        with suppress(OSError, UserError):  # a cache that cannot be written is no reason to stop
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"file": identity, "sha256": digest})
    return digest


def _identity(path: Path) -> dict:
    s = path.stat()
    return {
        "path": str(path),
        "size": s.st_size,
        "inode": s.st_ino,
        "mtime_ns": s.st_mtime_ns,
        "ctime_ns": s.st_ctime_ns,
    }


def _read(entry: Path) -> dict:
    try:
        content = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

"""Published files: fetches them from the hub or a URL, and identifies them by their hash.

A file that defines a benchmark is used only if its hash is the published one, so that a wrong or
damaged file never produces scores. A download is checked under a temporary name: one that is killed
or cut short leaves nothing that could be mistaken for the file.

A large file is hashed once; its hash is then kept in the user's cache (`KnownHashes`).
"""

import hashlib
import http.client
import json
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from t2i.errors import UserError, nearest_path
from t2i.files import file_sha256, reading, refuse_passing, replacing, text_sha256, write_text
from t2i.progress import progress_bar

_TIMEOUT = 60.0  # seconds without a byte
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
_LARGE = 16 << 20  # bytes; hashing a smaller file is faster than looking up its hash
# Nanoseconds. A file changed more recently may change again without its timestamps showing it.
_SETTLED = 2 * 10**9
# The hub's client has changed its HTTP library twice, and passes on that library's errors.
_HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "requests")


def cache_root() -> Path:
    """The user's cache folder: `T2I_CACHE`, or `~/.cache/t2i`."""
    return Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i")


# -- hashes ----------------------------------------------------------------------------------------
def file_status(path: Path) -> list[int] | None:
    """[size, modification time, change time] of a file; None if there is no such file.

    Raises:
        UserError: it cannot be read now, but perhaps later.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # gone, unreadable, or not a possible name
        refuse_passing(path, error)
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class KnownHashes:
    """Known hashes of files, kept in a JSON file, or only in memory if `place` is None.

    A hash is valid while the file's path, size and timestamps stay the same. The change time
    (ctime) cannot be set by `cp -p` or `touch -r`, so an overwritten file is hashed again even if
    its modification time was restored.
    """

    def __init__(self, place: Path | None):
        self.place = place
        try:
            content = json.loads(place.read_text(encoding="utf-8")) if place else {}
        except (OSError, ValueError):  # missing or damaged: files are hashed again
            content = {}
        self._entries: dict[str, list] = content if isinstance(content, dict) else {}

    def get(self, path: Path, status: list[int], *, just_now: bool = False) -> str | None:
        """The hash of a file whose status has not changed since; None if unknown.

        just_now: accept it even if the file had changed so shortly before it was hashed that it
            could have changed again unnoticed.
        """
        entry = self._entries.get(os.path.abspath(path))
        if entry is None or entry[:3] != status:
            return None
        return entry[4] if just_now or entry[3] - status[2] > _SETTLED else None

    def put(self, path: Path, status: list[int], seen: int, digest: str) -> None:
        """Remember the hash of a file that had this status at time `seen`, before it was read."""
        self._entries[os.path.abspath(path)] = [*status, seen, digest]

    def save(self) -> None:
        if self.place is not None:
            with suppress(OSError, UserError):  # unsaved, it only means hashing files again
                self.place.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.place, json.dumps(self._entries))


def remembered_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as lower-case hex; a large file is read only once while unchanged."""
    target = Path(path).resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name  # the hub's cache names large files by their hash
    seen, status = time.time_ns(), file_status(target)
    if status is None or status[0] < _LARGE:
        return file_sha256(target)
    known = KnownHashes(cache_root() / "hashes" / f"{text_sha256(str(target))[:32]}.json")
    digest = known.get(target, status)
    if digest is None:
        digest = file_sha256(target)
        known.put(target, status, seen, digest)
        known.save()
    return digest


def hashes_by_name(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by file name."""
    return {path.name: remembered_sha256(path) for path in paths}


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and hashes of several files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


# -- the hub ---------------------------------------------------------------------------------------
@cache
def hub_is_away() -> bool:
    """Whether the hub cannot be reached or does not answer. Checked once, before the hub's own
    client is used: that would retry for half a minute or more for every file.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode() or {"http", "https", "all"} & urllib.request.getproxies().keys():
        return False  # the client handles this itself, or a proxy resolves the hub's address
    hub = urlsplit(HfApi().endpoint)
    host, port = hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)
    try:
        link = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    except OSError:
        return True
    with link:
        link.settimeout(_ANSWER_SECONDS)
        try:
            if hub.scheme != "http":
                link = ssl.create_default_context().wrap_socket(link, server_hostname=host)
            with link:
                link.sendall(
                    f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                )
                link.recv(1)
        except TimeoutError:
            return True
        except OSError:  # something is there, and the hub's client may be able to talk to it
            return False
    return False


def fetch_folder(hub_id: str, patterns: Sequence[str] | None = None, *, advice: str) -> Path:
    """The local copy of a hub repository, fetched if it is not in the hub's cache.

    Args:
        patterns: file name patterns of the files to fetch; all files if None.
        advice: what to do, for the error message.
    """
    from huggingface_hub import snapshot_download

    wanted = None if patterns is None else list(patterns)
    advice = f"{advice}{nearest_path(hub_id)}"
    with asking_hub(f"{hub_id} is neither a local folder nor a model on the hub", advice):
        away = hub_is_away()  # if so, use what was fetched earlier
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=away))


def fetch_model(
    hub_id: str, settings: Sequence[str], weights: Sequence[str], *, advice: str
) -> Path:
    """The local copy of a model on the hub: its settings and the first kind of weights it has."""
    for pattern in weights:
        wanted = [*settings, pattern, f"{pattern}.index.json"]
        folder = fetch_folder(hub_id, wanted, advice=advice)
        if any(folder.glob(pattern)):
            return folder
    raise UserError(f"{hub_id} on the hub has none of {', '.join(weights)}")


@contextmanager
def asking_hub(what: str, advice: str = "") -> Iterator[None]:
    """Turn errors of requests to the hub into a UserError.

    Args:
        what: what went wrong if a request fails, for the message.
        advice: what to do.

    Raises:
        UserError: the hub refused, did not answer, or cannot have anything of this name.
    """
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in _HUB_LIBRARIES:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = "no connection to the hub, or no answer" if hub_is_away() else reason
        raise UserError(f"{what} ({reason}). {advice}".rstrip()) from error


# -- files of a benchmark --------------------------------------------------------------------------
@dataclass(frozen=True)
class ProvenFile:
    """A file that passed the hash check, and its hash (hex)."""

    path: Path
    digest: str


@dataclass(frozen=True)
class PublishedFile:
    """A file at a public address.

    Attributes:
        title: what messages call the file, without an article.
        names: accepted file names; a download gets the first.
        hashes: first hex digits of the hash of each accepted version.
        cache: name of its folder in the cache.
        advice: the alternative to downloading, such as "give it with --this-option".
        digest: computes the hash (hex).
    """

    title: str
    url: str
    names: tuple[str, ...]
    hashes: tuple[str, ...]
    cache: str
    advice: str
    digest: Callable[[Path], str] = remembered_sha256

    @property
    def cache_folder(self) -> Path:
        """Where downloads of this file are kept."""
        return cache_root() / self.cache

    def given(self, path: Path) -> ProvenFile:
        """The file at `path`, or under one of its names if `path` is a folder; checked."""
        if path.is_dir():
            held = self._held_by(path)
            if held is None:
                raise UserError(f"{path} holds no {self.title}: looked for {', '.join(self.names)}")
            path = held
        elif not path.exists():
            raise UserError(f"{path} does not exist: give the {self.title} or the folder it is in")
        return self._prove(path)

    def find(self, folder: Path | None = None) -> ProvenFile:
        """The file in `folder` or the cache, else downloaded into the cache; checked.

        Raises:
            UserError: a different file was found, or it cannot be downloaded; the message says what
                to put where.
        """
        for place in (folder, self.cache_folder):
            if place is not None and (held := self._held_by(place)):
                return self._prove(held)
        path = self.cache_folder / self.names[0]
        self._download(path)
        return self._prove(path)

    def _held_by(self, folder: Path) -> Path | None:
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def _prove(self, path: Path) -> ProvenFile:
        with reading(path):
            digest = self.digest(path)
        if not digest.startswith(self.hashes):
            raise UserError(
                f"{path} is not the published {self.title}: its hash is {digest}, but should "
                f"begin with {' or '.join(self.hashes)}. It is damaged or a different file; delete "
                f"it, or download {self.url} again"
            )
        return ProvenFile(path, digest)

    def _download(self, path: Path) -> None:
        """Download the file, unless another process has done so in the meantime."""
        from huggingface_hub import is_offline_mode

        advice = (
            f"Download {self.url} on another machine and copy it to {path.parent} here; or "
            f"{self.advice}"
        )
        if is_offline_mode():
            raise UserError(f"the {self.title} is missing, and HF_HUB_OFFLINE is set. {advice}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if path.is_file():
                    return
                with replacing(path) as temporary:
                    size = _fetch(self.url, temporary)
                    if not self.digest(temporary).startswith(self.hashes):
                        raise UserError(
                            f"the {size} bytes downloaded from {self.url} are not the published "
                            f"{self.title}. {advice}"
                        )
        except (OSError, http.client.HTTPException) as error:  # no network, disk full, ...
            raise UserError(f"the {self.title} cannot be downloaded ({error}). {advice}") from error


def _fetch(url: str, path: Path) -> int:
    """Download a URL to a file; returns the number of bytes."""
    request = urllib.request.Request(url, headers={"User-Agent": "t2i"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply, open(path, "wb") as file:
        size = reply.headers.get("Content-Length")
        bar = progress_bar(
            desc=url.rpartition("/")[2], total=size and int(size), unit="B", unit_scale=True
        )
        with bar:
            while block := reply.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        return file.tell()

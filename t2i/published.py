"""Files that others published: fetched from the hub or an address, proven, and known by their hash.

A file that a benchmark is defined by is used only if its hash is the published one, so that a wrong
or damaged file never turns into scores. A download is proven under a temporary name: what is killed
or cut short leaves nothing that is taken for the file.

A file of gigabytes is hashed once, and its hash remembered in the user's cache (`KnownHashes`).
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
from t2i.files import file_sha256, reading, replacing, text_sha256, write_text
from t2i.progress import progress_bar

_TIMEOUT = 60.0  # seconds without a byte
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
_LARGE = 16 << 20  # bytes; smaller files are read faster than their entry
_SETTLED = 2 * 10**9  # nanoseconds; a younger file may change again within one tick of its clock
# The hub's client has changed its HTTP library twice; its errors come through as they are.
_HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "requests")


def cache_root() -> Path:
    """The folder of everything that is kept for the user: `T2I_CACHE`, or `~/.cache/t2i`."""
    return Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i")


# -- hashes ----------------------------------------------------------------------------------------
def file_status(path: Path) -> list[int] | None:
    """[size, modification time, change time]; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # gone, unreadable, or no possible name
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class KnownHashes:
    """Hashes of files, kept in a JSON file; nowhere if that is None.

    A hash counts while the file has the same place, size and times. The time of change (ctime)
    cannot be set by `cp -p` or `touch -r`, so a file that was overwritten is read again even if its
    date was put back.
    """

    def __init__(self, place: Path | None):
        self.place = place
        try:
            content = json.loads(place.read_text(encoding="utf-8")) if place else {}
        except (OSError, ValueError):  # there is none, or it is damaged: files are read again
            content = {}
        self._entries: dict[str, list] = content if isinstance(content, dict) else {}

    def get(self, path: Path, status: list[int], *, just_now: bool = False) -> str | None:
        """The hash of a file that is as it was.

        just_now: also of one that changed so shortly before that it may change again unseen.
        """
        entry = self._entries.get(os.path.abspath(path))
        if entry is None or entry[:3] != status:
            return None
        return entry[4] if just_now or entry[3] - status[2] > _SETTLED else None

    def put(self, path: Path, status: list[int], seen: int, digest: str) -> None:
        """Remember a hash of a file whose status was `seen` at this time, before it was read."""
        self._entries[os.path.abspath(path)] = [*status, seen, digest]

    def save(self) -> None:
        if self.place is not None:
            with suppress(OSError, UserError):  # without it files are read again, and no more
                self.place.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.place, json.dumps(self._entries))


def remembered_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex; a large unchanged file is read only once."""
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
    """SHA-256 of several files."""
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
    """Whether the hub cannot be reached, or does not answer. It is tried once, before the hub's own
    client is used, which would retry for half a minute at every file, or for seven minutes.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode() or {"http", "https", "all"} & urllib.request.getproxies().keys():
        return False  # the client knows, or a proxy finds the hub's address
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
        except OSError:  # something is there, and its client may know how to talk to it
            return False
    return False


def fetch_folder(hub_id: str, patterns: Sequence[str] | None = None, *, advice: str) -> Path:
    """The local copy of what is not a folder here, fetched if it is not in the hub's cache.

    Args:
        patterns: of the files to fetch; all of them if None.
        advice: what the error's message says to do.
    """
    from huggingface_hub import snapshot_download

    wanted = None if patterns is None else list(patterns)
    said = f"{advice}{nearest_path(hub_id)}"
    with asking_hub(f"{hub_id} is neither a folder here nor a model of the hub", said):
        away = hub_is_away()  # then what was fetched before will do
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=away))


def fetch_model(
    hub_id: str, settings: Sequence[str], weights: Sequence[str], *, advice: str
) -> Path:
    """The local copy of a model of the hub: settings, and the first kind of weights that it has."""
    for pattern in weights:
        wanted = [*settings, pattern, f"{pattern}.index.json"]
        folder = fetch_folder(hub_id, wanted, advice=advice)
        if any(folder.glob(pattern)):
            return folder
    raise UserError(f"the hub's {hub_id} holds none of {', '.join(weights)}")


@contextmanager
def asking_hub(what: str, advice: str = "") -> Iterator[None]:
    """While the hub is asked: what it refuses, or what fails without a network, is the user's to
    mend.

    Args:
        what: went wrong then, for the message.
        advice: what to do.

    Raises:
        UserError: the hub refused, did not answer, or cannot have a thing of this name.
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
    """A file that passed the check, and its hash (hex)."""

    path: Path
    digest: str


@dataclass(frozen=True)
class PublishedFile:
    """A file at a public address.

    Attributes:
        title: what messages call it, without an article.
        names: what the file may be called; a download gets the first.
        hashes: first hex digits of the hash of each version that is accepted.
        cache: name of its folder in the cache.
        advice: what else to do without a network, as "give it with --this-option".
        digest: computes the hash, hex.
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
        """Where downloads are kept: a folder of `T2I_CACHE`, or of `~/.cache/t2i`."""
        return cache_root() / self.cache

    def given(self, path: Path) -> ProvenFile:
        """The file at `path`, or in the folder `path` under one of its names."""
        if path.is_dir():
            held = self._held_by(path)
            if held is None:
                raise UserError(f"{path} holds no {self.title}: looked for {', '.join(self.names)}")
            path = held
        elif not path.exists():
            raise UserError(f"{path} does not exist: give the {self.title} or its folder")
        return self._prove(path)

    def find(self, folder: Path | None = None) -> ProvenFile:
        """The file in `folder` or the cache, or else downloaded into the cache.

        Raises:
            UserError: what was found is another file, or it cannot be downloaded; the message says
                what to put where.
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
                f"{path} is not the published {self.title}: its hash is {digest}, which should "
                f"begin with {' or '.join(self.hashes)}. It is damaged or another file; delete it, "
                f"or fetch {self.url} again"
            )
        return ProvenFile(path, digest)

    def _download(self, path: Path) -> None:
        """Fetch the file, unless another process has done so meanwhile."""
        from huggingface_hub import is_offline_mode

        advice = (
            f"Elsewhere, download {self.url} and copy it to {path.parent} here; or {self.advice}"
        )
        if is_offline_mode():
            raise UserError(f"the {self.title} is not here and HF_HUB_OFFLINE is set. {advice}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if path.is_file():
                    return
                with replacing(path) as temporary:
                    size = _fetch(self.url, temporary)
                    if not self.digest(temporary).startswith(self.hashes):
                        raise UserError(
                            f"{self.url} gave {size} bytes that are not the published "
                            f"{self.title}. {advice}"
                        )
        except (OSError, http.client.HTTPException) as error:  # no network, disk full, ...
            raise UserError(f"the {self.title} cannot be downloaded ({error}). {advice}") from error


def _fetch(url: str, path: Path) -> int:
    """Write what the address gives; returns the number of bytes."""
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

"""The published files that a benchmark is defined by: found or downloaded, and proven before they
are used.

A file is used only if its hash is the published one, so that a wrong or damaged file never turns
into scores. A download is proven under a temporary name: what is killed or cut short leaves nothing
that is taken for the file.
"""

import http.client
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from t2i.errors import UserError
from t2i.files import file_sha256, replacing
from t2i.hashes import cache_root
from t2i.progress import progress_bar

_TIMEOUT = 60.0  # seconds without a byte


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
    digest: Callable[[Path], str] = file_sha256

    @property
    def cache_folder(self) -> Path:
        """Where downloads are kept: a folder of `T2I_CACHE`, or of `~/.cache/t2i`."""
        return cache_root() / self.cache

    def given(self, path: Path) -> ProvenFile:
        """The file at `path`, or in the folder `path` under one of its names.

        Raises:
            UserError: there is none, or it is another file.
        """
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
        try:
            digest = self.digest(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not digest.startswith(self.hashes):
            raise UserError(
                f"{path} is not the published {self.title}: its hash is {digest}, which should begin with "
                f"{' or '.join(self.hashes)}. It is damaged or another file; delete it, or fetch {self.url} again"
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
                            f"{self.url} gave {size} bytes that are not the published {self.title}. {advice}"
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

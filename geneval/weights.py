"""The judge's weight files: where they are looked for, downloaded from, and how they are proven.

A file is used only if its SHA-256 is the published one, so that a wrong or damaged file never
turns into scores. Detector files carry the first eight digits in their names (OpenMMLab's rule),
CLIP's has all 64 in its address.
"""

from __future__ import annotations

import http.client
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from t2i.weights import file_sha256


@dataclass(frozen=True)
class WeightSource:
    """A published file.

    hashes: first hex digits of the SHA-256 of each version that is accepted. names: what the file
    may be called; the first one is downloaded.
    """

    title: str
    url: str
    names: tuple[str, ...]
    hashes: tuple[str, ...]


# One training run under two names: mmdet 3.x's (what GenEval's download script fetches), 2.x's.
MASK2FORMER = WeightSource(
    title="Mask2Former Swin-S (COCO instances)",
    url="https://download.openmmlab.com/mmdetection/v3.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    names=(
        "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",  # as GenEval's script renames it
    ),
    hashes=("c9d0c4f2", "743b7d99"),
)
CLIP = WeightSource(
    title="OpenAI CLIP ViT-L/14",
    url="https://openaipublic.azureedge.net/clip/models/"
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    names=("ViT-L-14.pt",),
    hashes=("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",),
)


@dataclass(frozen=True)
class WeightFile:
    """A file that passed the check, and its SHA-256."""

    path: Path
    sha256: str


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: `T2I_CACHE`, or `~/.cache/t2i`."""
    return Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i") / "geneval"


def given_weights(source: WeightSource, path: Path) -> WeightFile:
    """The file of `source` at `path`, a file or a folder that holds it under one of its names.

    Raises:
        ValueError: there is none, or its SHA-256 is another.
    """
    if path.is_dir():
        held = [path / name for name in source.names if (path / name).is_file()]
        if not held:
            raise ValueError(
                f"{path} holds no file of {source.title}: looked for {', '.join(source.names)}"
            )
        path = held[0]
    elif not path.exists():
        raise ValueError(
            f"there are no weights at {path}: give the file of {source.title} or its folder"
        )
    return check_hash(path, source)


def find_weights(source: WeightSource, folder: Path | None = None) -> WeightFile:
    """The file of `source` in `folder` or the cache, or else downloaded into the cache.

    Raises:
        ValueError: a file was found but its SHA-256 is another, or it cannot be downloaded; the
            message says what to put where.
    """
    places = [cache_folder()] if folder is None else [folder, cache_folder()]
    for path in (place / name for place in places for name in source.names):
        if path.is_file():
            return check_hash(path, source)
    return check_hash(_download(source), source)


def check_hash(path: Path, source: WeightSource) -> WeightFile:
    """Read the file once and compare its SHA-256.

    Raises:
        ValueError: it cannot be read or is another file; both hashes are named.
    """
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error
    if not digest.startswith(source.hashes):
        raise ValueError(
            f"{path} is not the published file of {source.title}: its SHA-256 is {digest}, expected "
            f"{' or '.join(h if len(h) == 64 else h + '...' for h in source.hashes)}. It is damaged "
            f"or another file; delete it, or fetch {source.url} again"
        )
    return WeightFile(path, digest)


def _download(source: WeightSource) -> Path:
    """Fetch into the cache, checked before the file gets its name; other processes wait."""
    from huggingface_hub.constants import is_offline_mode
    from torch.hub import download_url_to_file

    path = cache_folder() / source.names[0]
    advice = (
        f"On a machine with a network, download {source.url} and copy it to {path.parent} here, or "
        "into the folder that you give as --detector-weights"
    )
    if is_offline_mode():
        raise ValueError(f"{source.title} is not here and HF_HUB_OFFLINE is set. {advice}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                download_url_to_file(source.url, str(path), hash_prefix=source.hashes[0])
    except RuntimeError as error:  # torch's name for a wrong hash
        raise ValueError(f"{source.url} gave another file than expected: {error}") from error
    except (OSError, http.client.HTTPException) as error:  # OSError: URLError, disk full, ...
        raise ValueError(f"{source.title} cannot be downloaded ({error}). {advice}") from error
    return path

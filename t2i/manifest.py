"""The manifest of a checkpoint folder: name, size and SHA-256 of each file, written last."""

import logging
import os
from pathlib import Path, PurePosixPath

from t2i.errors import UserError, no_folder, shorten
from t2i.fields import read_object
from t2i.files import file_sha256, write_json
from t2i.lfs import refuse_pointers
from t2i.published import remembered_sha256

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
_OF_RUN = ("checkpoints", "best")
"""Folders within a run folder that the run itself replaces or deletes from."""
_LOADED = ("config.json", "codec.safetensors", "backbone.safetensors", "adapter/*")


class DamagedError(UserError):
    """A checkpoint folder is incomplete, or one of its files has changed."""


def refuse_in_checkpoint(place: str | Path, option: str) -> None:
    """UserError if `place`, given by `option`, lies where a run keeps its checkpoints: anything
    written there would be lost when the run deletes or replaces the folder.
    """
    path = Path(os.path.realpath(place))
    for folder in (path, *path.parents):
        run_dir = folder.parent
        if folder.name in _OF_RUN and (
            (run_dir / "metrics.jsonl").is_file() or any(run_dir.glob(f"checkpoints/*/{MANIFEST}"))
        ):
            own = f"; --resume takes the run's own folder, {run_dir}" if option == "run_dir" else ""
            raise UserError(
                f"{option} {place} lies in {folder}, where a training run keeps its checkpoints and "
                f"which it deletes or replaces as a whole: choose another folder{own}"
            )


def other_kind(folder: Path) -> str:
    """The end of a message about a folder that is neither a checkpoint nor a base: what to give
    instead, if another program is known to write such folders.
    """
    if (folder.parent / MANIFEST).is_file():
        return f"; it is a part of {folder.parent}"
    if (folder / "blobs").is_dir() and (snapshots := sorted(folder.glob("snapshots/*/"))):
        return f"; it is a place in the hub's cache, whose model is {snapshots[-1]}"
    if (folder / "adapter_config.json").is_file():
        return (
            "; it is an adapter alone: merge it into its base with PEFT (merge_and_unload, then "
            "save_pretrained), and give that folder"
        )
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*mp_rank_*_states.pt")):
        return (
            "; it is a training state of DeepSpeed: the zero_to_fp32.py in it or above it makes "
            "weight files"
        )
    return ""


def refuse_replacing(folder: Path) -> None:
    """UserError unless a checkpoint may be written there, which replaces the folder as a whole: it
    must be new, empty, or a checkpoint of which every file is listed, without a training state.
    """
    refuse_in_checkpoint(folder, "folder")
    if folder.name in ("", ".."):
        raise UserError(f"{folder} cannot be replaced by a checkpoint: name a new folder")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} {no_folder(folder)}: choose another place for the checkpoint")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    known = {MANIFEST, *_read(folder)} if (folder / MANIFEST).is_file() else set()
    if lost := sorted(n for n in there if n not in known or n.startswith(TRAINING_STATE)):
        raise UserError(
            f"{folder} would be replaced as a whole, and holds {shorten(lost, most=3)}: "
            "choose a new folder, or one that holds nothing but a checkpoint's weights"
        )


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder whose other files are all finished."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def check_files(folder: Path, *, with_state: bool, contents: bool) -> None:
    """Compare a folder with its manifest: file sizes and, with `contents`, checksums.

    Raises:
        DamagedError: names the file that is missing, cut short, changed, not listed, or outside the
            folder.
    """
    files = _read(folder)
    state = folder / TRAINING_STATE  # it may be deleted to save space
    if with_state and not (
        state.is_dir() and any(name.startswith(f"{TRAINING_STATE}/") for name in files)
    ):
        raise DamagedError(
            f"{state} is missing, without which no run can resume: start a new one from its weights, "
            f"with --backbone.weights {folder}"
        )
    for pattern in (*_LOADED, f"{TRAINING_STATE}/**/*") if with_state else _LOADED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.relative_to(folder).as_posix() not in files:
                raise DamagedError(f"{path} is not in the {MANIFEST}; copy the folder again")
    for name, (size, sha256) in files.items():
        path = folder / name
        if name.startswith(f"{TRAINING_STATE}/") and not with_state:
            continue
        if not _is_inside(path, folder):
            what = f"is not within the checkpoint folder: its {MANIFEST} or a link points outside"
        elif not path.is_file() or path.stat().st_size != size:
            refuse_pointers(path)
            what = f"is missing or does not have the {size} bytes that the manifest states"
        elif contents and sha256 is not None and remembered_sha256(path) != sha256:
            what = "is damaged: its SHA-256 is not the one in the manifest"
        else:
            continue
        raise DamagedError(f"{path} {what}; copy the folder again")
    if contents and any(sha256 is None for _, sha256 in files.values()):
        log.warning("%s has no checksums (an older version wrote it): sizes were compared", folder)


def listed_weights(folder: Path) -> dict[str, str | None]:
    """SHA-256 by name of a checkpoint's weight files, according to its manifest."""
    files = _read(folder).items()
    return {name: sha256 for name, (_, sha256) in files if name.endswith(".safetensors")}


def _read(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Size and hash by file name, from the manifest; older versions wrote only the size."""
    path = folder / MANIFEST
    if not path.is_file():
        below = [p for way in ("step_*", "*/checkpoints/step_*") for p in folder.glob(way)]
        whole = sorted(place for place in below if (place / MANIFEST).is_file())
        hint = f"; {whole[-1]} is one" if whole else other_kind(folder)
        raise DamagedError(
            f"{folder} is not a complete checkpoint folder: {MANIFEST} is missing (a base is given "
            "as --base.weights, or to load_backbone; after a run that stopped while saving, use an "
            f"earlier step){hint}"
        )
    try:
        found = {name: _entry(entry) for name, entry in read_object(path)["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not a list of files with their sizes ({error}); copy the folder again"
        ) from error
    if "config.json" not in found:
        raise DamagedError(f"{path} does not list config.json; copy the folder again")
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DamagedError(f"{path} lists {name!r}, which is not within the folder")
    return found


def _entry(entry: object) -> tuple[int, str | None]:
    size, sha256 = (entry["bytes"], entry["sha256"]) if isinstance(entry, dict) else (entry, None)
    if type(size) is not int or not isinstance(sha256, str | None):
        raise TypeError(f"not a size and a hash: {entry!r}")
    return size, sha256


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is still within the folder once links are followed."""
    # In the hub's cache, files are links to its folder of blobs.
    home = folder.resolve()
    homes = [home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots")]
    return any(path.resolve().is_relative_to(h) for h in homes)

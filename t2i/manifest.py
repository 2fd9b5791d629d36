"""The manifest of a checkpoint folder: name, size and SHA-256 of each file, written last."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from t2i.errors import UserError
from t2i.fields import from_json, read_object
from t2i.files import file_sha256, write_json
from t2i.published import remembered_sha256

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
_LOADED = ("config.json", "codec.safetensors", "backbone.safetensors", "adapter/*")


class DamagedError(UserError):
    """A checkpoint folder is incomplete, or a file of it is not what was written."""


@dataclass(frozen=True)
class _Entry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """List every file of a folder that is otherwise finished."""
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
    """Compare a folder with its manifest: the sizes, and the contents if asked for.

    Raises:
        DamagedError: names the file that is missing, cut short, changed, not listed, or not within
            the folder.
    """
    files = _read(folder)
    if with_state and not any(name.startswith(f"{TRAINING_STATE}/") for name in files):
        raise DamagedError(f"{folder / TRAINING_STATE} is missing: nothing can resume from it")
    for pattern in (*_LOADED, f"{TRAINING_STATE}/**/*") if with_state else _LOADED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.relative_to(folder).as_posix() not in files:
                raise DamagedError(f"{path} is not in the {MANIFEST}; copy the folder again")
    for name, entry in files.items():
        path = folder / name
        if name.startswith(f"{TRAINING_STATE}/") and not with_state:
            continue
        if not _is_inside(path, folder):
            what = f"is not within the checkpoint folder: its {MANIFEST} or a link leads out"
        elif not path.is_file() or path.stat().st_size != entry.bytes:
            what = f"is missing or has not the {entry.bytes} bytes that the manifest says"
        elif contents and remembered_sha256(path) != entry.sha256:
            what = "is damaged: its SHA-256 is not what the manifest says"
        else:
            continue
        raise DamagedError(f"{path} {what}; copy the folder again")


def _read(folder: Path) -> dict[str, _Entry]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(
            f"{folder} is not a complete checkpoint folder: {MANIFEST} is missing "
            "(a base model is loaded with load_backbone; a run that stopped while saving leaves "
            "an earlier step)"
        )
    try:
        files = read_object(path)["files"].items()
        found = {name: from_json(_Entry, entry, f"files: {name}") for name, entry in files}
    except (UserError, KeyError, AttributeError) as error:
        raise DamagedError(
            f"{path} is no list of files with sizes and hashes ({error}): load it with the version "
            "that wrote it, or copy the folder again"
        ) from error
    if "config.json" not in found:
        raise DamagedError(f"{path} does not list config.json; copy the folder again")
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DamagedError(f"{path} lists {name!r}, which is not within the folder")
    return found


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is within the folder, also if links are followed."""
    # The hub's cache links to a folder of blobs of its own.
    home = folder.resolve()
    homes = [home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots")]
    return any(path.resolve().is_relative_to(h) for h in homes)

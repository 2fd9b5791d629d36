"""Where a backbone's files come from, what they were, and where they are now.

A source is a file, a folder with a config.json (the layout of `t2i/assets/shapes`), the name of a
shipped offline base ("shapes", ...), or a file on the hub as "owner/repo:file". Families that
publish a folder (Janus-Pro) take that folder, or "owner/repo".
"""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t2i.errors import UserError, nearest_path
from t2i.fields import read_object
from t2i.files import namesake
from t2i.lfs import refuse_pointers
from t2i.manifest import other_kind
from t2i.models.families import FAMILIES, Family, find_family
from t2i.published import asking_hub, fetch_model, hub_is_away, remembered_sha256
from t2i.weights import stored_sha256

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class _File:
    """One of the files of a base, for messages and hashes."""

    what: str
    sha256: str
    """Field of `BackboneSource` with its hash."""
    option: str


_FILES = {
    "weights": _File("weight file", "sha256", "--base.weights PATH (base=)"),
    "tokenizer": _File("image tokenizer", "tokenizer_sha256", "--base.tokenizer PATH (tokenizer=)"),
    "text_encoder": _File(
        "text encoder", "text_encoder_sha256", "--base.text-encoder PATH (text_encoder=)"
    ),
}


@dataclass(frozen=True)
class BackboneSource:
    """Everything needed to load the same backbone again; stored in every checkpoint folder."""

    family: str
    weights: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    text_encoder_dtype: str = "float32"
    grid: tuple[int, int] | None = None
    """Height and width in codes, if neither the config nor the file name gives them."""
    config: dict | None = None
    """Shape of the backbone: the fields of its family's config dataclass."""
    sampling: dict = field(default_factory=dict)
    """Settings that differ from the family's defaults."""
    sha256: str | None = None
    """Hash of the weight file, or over the weight files of a folder."""
    tokenizer_sha256: str | None = None
    """Hash of the image tokenizer's file, if there is one."""
    text_encoder_sha256: str | None = None
    """Hash over the text encoder's files, or of the family's `prompt_file`."""
    generation_only: bool = False
    """Whether only the parts needed to draw images were loaded."""
    started_from: str | None = None
    """Checkpoint that the run started from. Its own checkpoints then hold all backbone weights."""
    shipped_base: str | None = None
    """Shipped base that an export was made from; `weights` no longer names it."""


def resolve(source: str | Path, *, folder: bool = False) -> Path:
    """The local path of a source. Files on the hub are downloaded into the hub's cache.

    Args:
        folder: the source is a folder ("owner/repo"), not a file ("owner/repo:file").
    """
    text = str(source)
    if Path(text).exists():
        return Path(text)
    repo, _, filename = text.partition(":")
    if not _on_hub(text, folder):
        raise _nowhere(text, folder)
    if folder:
        settings, weights = ["*.json", "*.jinja"], ["*.safetensors", "*.bin"]
        return fetch_model(repo, settings, weights, advice="Check the name")
    from huggingface_hub import hf_hub_download

    with asking_hub(f"{text} is not here, and the hub did not give {filename} of {repo}"):
        return Path(hf_hub_download(repo, filename, local_files_only=hub_is_away()))


def check_place(source: object, what: str) -> None:
    """UserError for what can be neither a path nor a name."""
    try:
        name = os.fsencode(source) if isinstance(source, str | os.PathLike) else b""
        # No file system has longer names of files.
        usable = bool(name) and 0 not in name and max(map(len, name.split(b"/"))) <= 255
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise UserError(f"{what} is {source!r:.80}: give a path or a name")


def check_places(**places: str | Path | None) -> None:
    """`check_place` for those that are given."""
    for name, place in places.items():
        if place is not None:
            check_place(place, name)


def check_named(source: str | Path, *, folder: bool = False) -> None:
    """UserError if a source is no local path, no shipped base and no name on the hub."""
    text = str(source)
    if not (Path(text).exists() or text in shipped_bases() or _on_hub(text, folder)):
        raise _nowhere(text, folder)


def _on_hub(text: str, folder: bool) -> bool:
    """Whether the text has the form of a hub file ("owner/repo:file") or folder ("owner/repo")."""
    repo, _, filename = text.partition(":")
    return repo.count("/") == 1 and all(repo.split("/")) and bool(filename) != folder


def _nowhere(text: str, folder: bool) -> UserError:
    return UserError(
        f"{text} is not a file, a folder, a shipped base ({', '.join(shipped_bases())}) "
        f"or a hub {'folder written owner/repo' if folder else 'file written owner/repo:file'}"
        f"{nearest_path(text)}"
    )


def lasting(source: str | Path) -> str:
    """A source as a checkpoint stores it: local paths become absolute."""
    if str(source) in shipped_bases():
        if (Path(source) / "config.json").is_file():
            log.warning(namesake(str(source), "the base that the kit ships"))
        return str(source)
    return str(absolute(source) if Path(source).exists() else source)


def absolute(path: str | Path) -> Path:
    """The absolute path. A link to a file keeps its own name, which tells the file's format and
    shape: the link's target may be named by a hash (the hub's cache, DVC).
    """
    # Path.resolve fails if a link leads to itself.
    there, name = os.path.split(path) if os.path.isfile(path) else (path, "")
    return Path(os.path.realpath(there), name)


def base_files(
    family: str,
    weights: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    **settings: Any,
) -> BackboneSource:
    """The files of a base, each `lasting`, with the rest of a `BackboneSource`'s settings."""

    def lasts(source: str | Path | None) -> str | None:
        return None if source is None else lasting(source)

    return BackboneSource(
        family, lasting(weights), lasts(tokenizer), lasts(text_encoder), **settings
    )


def shipped_bases() -> list[str]:
    """Names of the base models in the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def family_of(source: str | Path) -> str:
    """The family that the config.json of a shipped base, backbone or published folder names."""
    path = _folder(source) / "config.json"
    if path.is_file() and (named := _named_family(read_object(path))):
        return named
    if not Path(source).exists() and str(source).count("/") != 1:
        resolve(source)  # raises an error that lists what it could have been
    raise UserError(f"{source} does not name its family: give one of {', '.join(FAMILIES)}")


def _named_family(stored: dict) -> str | None:
    """The family that the content of a config.json names, itself or by its published model type."""
    published = (n for n in FAMILIES if stored.get("model_type") in find_family(n).model_types)
    named = stored.get("family", next(published, None))
    return named if isinstance(named, str) else None


def _folder(source: str | Path) -> Path:
    return (ASSETS if str(source) in shipped_bases() else Path()) / source


def expand_folder(source: BackboneSource) -> BackboneSource:
    """Fill in missing fields from a backbone folder's config.json; fields already set win."""
    family, path, weights = find_family(source.family), _folder(source.weights), source.weights
    stored: dict = {}
    files: dict[str, str] = {}
    if path.is_dir():
        stored = _read_backbone_folder(path, family)
        files = {name: str(path / stored[name]) for name in _FILES if name in stored}
        encoder = stored.get("text_encoder", "")
        if encoder.count("/") == 1 and not (path / encoder).exists():
            files["text_encoder"] = encoder  # a hub id
        weights = files.get("weights", str(path))  # a published folder is given as a whole
    own = stored.get("config", {}).get("grid")
    if source.config is None and own and source.grid and own != list(source.grid):
        raise UserError(
            f"grid={source.grid} is given, but {path / 'config.json'} says {own}: leave out the grid, "
            "which is only needed for a weight file that was renamed"
        )
    inside = weights if family.tokenizer_inside else None
    return replace(
        source,
        weights=weights,
        tokenizer=source.tokenizer or files.get("tokenizer") or inside,
        text_encoder=source.text_encoder or files.get("text_encoder"),
        config=source.config or stored.get("config"),
        sampling=source.sampling or stored.get("sampling", {}),
    )


def no_backbone(folder: Path) -> UserError:
    """The error about a folder without the config.json that all backbone folders have."""
    return UserError(
        f"{folder} is not a backbone folder: it has no config.json "
        f"(give a weight file by its own path){other_kind(folder)}"
    )


def _read_backbone_folder(path: Path, family: Family) -> dict:
    """The content of a backbone folder's config.json; empty for a folder as published."""
    if not (path / "config.json").is_file():
        raise no_backbone(path)
    stored = read_object(path / "config.json")
    if "family" not in stored and family.published_as_folder:
        return {}
    if (named := _named_family(stored) or family.name) != family.name:
        raise UserError(f"{path} holds a {named} backbone, not {family.name}")
    kinds: dict[str, type] = dict.fromkeys(("family", *_FILES), str)
    kinds |= dict.fromkeys(("config", "sampling"), dict)
    for name in ("family", "weights", *(() if family.published_as_folder else ("config",))):
        if name not in stored:
            raise UserError(
                f"{path} is not a backbone folder: config.json has no {name!r} "
                "(load a checkpoint or run folder with from_pretrained)"
            )
    if strange := sorted(stored.keys() - kinds.keys()):
        raise UserError(
            f"{path / 'config.json'} has {', '.join(strange)}, which is none of {', '.join(kinds)}"
        )
    for name, kind in kinds.items():
        if not isinstance(stored.get(name, kind()), kind):
            raise UserError(
                f"{path / 'config.json'}: {name} is {stored[name]!r:.80}, "
                f"but must be of type {kind.__name__}"
            )
    return stored


# -- what the files were ---------------------------------------------------------------------------
def with_hashes(source: BackboneSource, folder: Path) -> BackboneSource:
    """A checkpoint folder's source with missing SHA-256 hashes filled in."""
    files = expand_folder(beside(source, folder))
    missing = {n: f.sha256 for n, f in _FILES.items() if getattr(source, f.sha256) is None}
    found: dict[str, Any] = {of: _file_hash(files, name) for name, of in missing.items()}
    return replace(source, **found)


def weights_sha256(source: BackboneSource) -> str:
    """SHA-256 of a base's weights."""
    found = source.sha256 or _file_hash(expand_folder(source), "weights")
    assert found is not None, "every base has weights"
    return found


def _file_hash(files: BackboneSource, name: str) -> str | None:
    """SHA-256 of one of an expanded source's files; None if it has no such file."""
    family = find_family(files.family)
    if name == "weights":
        return stored_sha256(resolve(files.weights, folder=family.published_as_folder))
    if name == "tokenizer":
        return files.tokenizer and stored_sha256(resolve(files.tokenizer))
    if family.prompt_file is not None:
        return remembered_sha256(resolve(files.weights, folder=True) / family.prompt_file)
    return files.text_encoder and family.text_encoder_class.hash_of(files.text_encoder)


def prove(files: BackboneSource, *, weights: bool = True) -> None:
    """Compare an expanded source's files with its recorded hashes.

    Args:
        weights: whether to check the weight file, too.

    Raises:
        UserError: a file is not the one that the checkpoint was trained with.
    """
    for name, file in _FILES.items():
        expected = getattr(files, file.sha256)
        if expected is None or (name == "weights" and not weights):
            continue
        try:
            found = _file_hash(files, name)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
        if found != expected:
            place = Path(getattr(files, name) or files.weights)
            refuse_pointers(*(place.iterdir() if place.is_dir() else [place]))
            raise UserError(
                f"{place} is not the {file.what} that the "
                f"checkpoint was trained on (its SHA-256 differs); {file.option} names another"
            )


# -- where the files are now -----------------------------------------------------------------------
def beside(source: BackboneSource, folder: Path) -> BackboneSource:
    """A checkpoint folder's source, with paths relative to the folder (exports) made absolute."""
    given = {name: getattr(source, name) or "" for name in _FILES}
    inside = {name: path for name, path in given.items() if path.startswith("..")}
    found: dict[str, Any] = {name: str(absolute(folder / path)) for name, path in inside.items()}
    return replace(source, **found)


def moved(
    source: BackboneSource,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> BackboneSource:
    """A checkpoint's source, with the paths of files that have moved updated.

    Args:
        base: the weight file, or the folder that the files moved to, in which each is found by
            its name or the end of its old path. Files next to a given weight file are found, too.
            A tokenizer or text encoder that still exists at its old path keeps it.
        tokenizer: the image tokenizer's file.
        text_encoder: the text encoder's folder or hub id.

    Raises:
        UserError: `base` does not exist, or is a folder with none of the files.
    """
    weights, root = source.weights, None
    if base is not None and Path(base).is_dir():
        root = absolute(base)
        found = _under(root, source.weights)
        if found is None and (root / "config.json").is_file():
            found = root
        names = [name for name in (source.weights, source.tokenizer, source.text_encoder) if name]
        if found is None and not any(_under(root, name) for name in names):
            raise UserError(
                f"{base} holds none of the base's files ({', '.join(names)}): give the folder to "
                "which they moved, or leave out the option"
            )
        weights = str(found or source.weights)
    elif base is not None:
        check_named(base, folder=find_family(source.family).published_as_folder)
        weights = str(base)
        if (file := absolute(base)).is_file():
            root = file.parent
            # A backbone folder's own weight file stands for the folder, which brings the rest.
            whole = source.tokenizer is None and (root / "config.json").is_file()
            weights = str(root if whole else file)
    return replace(
        source,
        weights=weights,
        tokenizer=_helper(tokenizer, source.tokenizer, root),
        text_encoder=_helper(text_encoder, source.text_encoder, root),
    )


def _helper(given: str | Path | None, stored: str | None, root: Path | None) -> str | None:
    """The tokenizer or text encoder: the given one, else the stored one, searched under `root`."""
    if given is not None:
        return lasting(given)
    if stored is None or root is None or Path(stored).exists():
        return stored
    return str(_under(root, stored) or stored)


def _under(root: Path, stored: str) -> Path | None:
    """The path under `root` that matches the longest end of a stored path or hub name, if any."""
    parts = [part for part in Path(stored.replace(":", "/")).parts if part != "/"]
    ends = (absolute(root.joinpath(*parts[i:])) for i in range(len(parts)))
    return next((end for end in ends if end.exists()), None)


def refuse_gone(source: BackboneSource, folder: Path, *, weights: bool) -> None:
    """UserError naming each local file that is gone (with `weights`, the weight file, too)."""
    gone = [
        f"{path} ({file.what}: {file.option})"
        for name, file in _FILES.items()
        if (path := getattr(source, name)) is not None
        and (weights or name != "weights")
        and Path(path).is_absolute()
        and not Path(path).exists()
    ]
    if gone:
        raise UserError(
            f"{folder} was trained with files that are gone: {'; '.join(gone)}. "
            "--base.weights FOLDER (base=) finds all that moved into one folder. In training these "
            "options begin with --backbone; to start a new run from it, export it with --base first "
            "and start from the export"
        )

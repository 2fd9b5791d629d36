"""Files and folders, for every part of the kit: atomic writes, reading, and checks before the work
begins (`ownership.py` has locks).

Nothing here depends on what a file contains.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i.errors import ONE_OBJECT, UserError, broken_link, not_json, refuse_utf16
from t2i.lfs import refuse_pointers

PARTIAL, REPLACED = ".t2i-partial", ".t2i-old"
"""Name endings of temporary folders. Folders named so get deleted: users must not use them."""
_PASSING = {  # EIO: what mounted object stores, and NFS mounted "soft", answer to a lost network
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
    errno.ENETUNREACH,
}
_OF_FILES = (".png", ".jpg", ".npy", ".npz", ".html", ".json", ".pt", ".safetensors", ".zip")


# -- writing, whole or not at all ------------------------------------------------------------------
@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name next to `path` to write to; it takes the final name when the block ends.

    A reader sees the old file or the new one, also after a power cut. Several processes may write
    the same file at once.
    """
    path = Path(path)
    with saving(path):
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.touch()  # with the umask's permissions
            mode = temporary.stat().st_mode
            yield temporary
            _finish(temporary, mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A fresh folder next to `folder` to write to; it takes the final name when the block ends.

    If the block fails, the fresh folder is removed. Its name is `partial_folder(folder)`, so that
    other processes can write to it, too; only one of them may enter this context.
    """
    folder = Path(folder)
    partial, old = partial_folder(folder), _old_folder(folder)
    try:
        with saving(folder):
            _remove(partial)
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _finish(path, partial.stat().st_mode)
            _remove(old)
            if folder.exists() or folder.is_symlink():
                os.rename(folder, old)
            os.rename(partial, folder)
            _remove(old)
    finally:
        _remove(partial)


def _remove(folder: Path) -> None:
    """Remove a folder if it exists; if it is a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """The temporary folder that `replacing_folder` writes to."""
    return folder.with_name(folder.name + PARTIAL)


def settle_folder(folder: Path) -> None:
    """Clean up after `replacing_folder` was killed: remove a half-written folder, and restore the
    old one if the new one had not replaced it yet.
    """
    old = _old_folder(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for left in (old, partial_folder(folder)):
        _remove(left)


def _old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + REPLACED)


def _finish(path: Path, mode: int) -> None:
    """Force a file to disk, with the permissions in `mode`: libraries may set the owner's only."""
    there = path.stat().st_mode
    if missing := mode & 0o666 & ~there:
        path.chmod(there | missing)
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: object) -> Path:
    """Write indented JSON, whole or not at all."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def saving(what: str | Path) -> Iterator[None]:
    """Within it, a full disk or missing permission becomes a UserError that names `what`.

    Other errors keep their traceback. Libraries wrap the system's error (torch in a RuntimeError,
    safetensors in its own class), so the error's text is checked, too.

    Raises:
        UserError: the disk is full, a quota is reached, or the place cannot be written to.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _full(error) or _forbidden(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {what}: {reason}") from error


# torch's zip writer and numpy do not report why a write was incomplete: they say "unexpected pos",
# "file write failed" or "100 requested and 60 written".
_FULL = (
    *("No space left", "quota exceeded", "os error 28"),
    *("unexpected pos", "file write failed"),
)
_SHORT = re.compile(r"\d+ requested and \d+ written")
_NOT_READ = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NOT_HERE = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def _full(error: Exception) -> str | None:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or any(words in str(error) for words in _FULL) or _SHORT.search(str(error)):
        return "no space is left on the disk. Free some and start again"
    return None


def _forbidden(error: Exception) -> str | None:
    if isinstance(error, _NOT_HERE):
        return f"{error.strerror} ({error.filename}). Choose another place"
    if getattr(error, "errno", None) == errno.EROFS:
        return "the file system is read-only. Choose another place"
    if getattr(error, "errno", None) == errno.EFBIG or "os error 27" in str(error):
        return "the file is larger than the file system or a user limit allows"
    return None


# -- reading ---------------------------------------------------------------------------------------
@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Within it, failing to open a file that the user named becomes a UserError.

    Raises:
        UserError: the file does not exist, is a folder or a link to itself, or may not be read.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, _NOT_READ) and error.errno != errno.ELOOP:
            raise
        raise UserError(f"{what} cannot be read: {error.strerror}") from error


def unreadable_now(what: str | Path, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(f"{what} cannot be read now ({why}). Start again, without it if this stays so")


def refuse_passing(what: str | Path, error: Exception) -> None:
    """UserError if an error is the machine's or a network disk's, not the file's: it may pass."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise unreadable_now(what, error) from error


def parse_json(content: bytes, **options: Any) -> Any:
    """The content of JSON; ValueError also for half a character (an emoji that a program cut to
    "\\ud83d"), which cannot be written again as UTF-8. options: of `json.loads`.
    """
    found = json.loads(content, **options)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's content (`object_pairs_hook`); ValueError for a name that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)!r} twice; delete one")
    return found


def read_json(path: str | Path) -> Any:
    """The content of a JSON file."""
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return parse_json(content)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        refuse_pointers(Path(path))
        text = f"{path} is damaged or not JSON ({error}); copy it again or recreate it"
        raise UserError(text) from error


def read_json_lines(
    path: str | Path, parse: Callable[..., Any] = parse_json
) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty lines are skipped, and repeated names refused."""
    with reading(path):
        content = Path(path).read_bytes()
    refuse_utf16(content, path)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        at = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {at} is not UTF-8: save the file as UTF-8") from error
    rows = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line, object_pairs_hook=once_each))
        except (ValueError, RecursionError) as error:
            refuse_pointers(Path(path))
            raise not_json(f"{path} line {number}", error) from error
        if not isinstance(rows[-1], dict):
            raise UserError(
                f"{path} line {number} is not a JSON object: {line[:80]!r}; {ONE_OBJECT}"
            )
    return rows


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, as lower-case hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_sha256(content: object) -> str:
    """SHA-256 of a JSON-compatible object, with sorted keys."""
    return text_sha256(json.dumps(content, sort_keys=True))


def namesake(name: str, meaning: str) -> str | None:
    """A warning if a file here has the same name as something that the kit ships, else None.

    The rule everywhere: a bare name means what the kit ships, `./name` the file or folder.
    """
    if not Path(name).exists():
        return None
    return f"{name!r} is taken for {meaning}; write './{name}' for the file or folder of that name"


# -- before the work -------------------------------------------------------------------------------
def writable_folder(folder: str | Path, *, make: bool = True) -> Path:
    """Create a folder if it does not exist, and check that files can be written there.

    Call it before the work whose results go there. With `make=False` no folder is created: if it
    does not exist, check that it could be created.

    Raises:
        UserError: it is a file (or new, with a file's ending), or cannot be created or written to.
    """
    folder = there = Path(folder)
    if folder.suffix.lower() in _OF_FILES and not folder.exists():
        raise UserError(f"{folder} must be a folder, but has the name of a file; give another name")
    try:
        if lost := broken_link(folder):
            raise UserError(f"cannot write to {folder}: {lost}")
        while not make and not there.exists() and there != there.parent:
            there = there.parent
        there.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:  # whatever the reason, the user chose this place
        reason = _full(error) or f"{error.strerror}. Choose another place"
        raise UserError(f"cannot write to {folder}: {reason}") from error
    return folder


def writable_file(path: str | Path, *, make: bool = True) -> Path:
    """Check that a file can be written or overwritten; `make` its folder, as in `writable_folder`.

    Raises:
        UserError: it is a folder or a link to nothing, or its folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    if lost := broken_link(path):  # writing would replace the link
        raise UserError(f"cannot write {path}: {lost}")
    writable_folder(path.parent, make=make)
    return path

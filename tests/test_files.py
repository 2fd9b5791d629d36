"""Files and folders that are complete or absent, waiting for files, overriding settings."""

import errno
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from helpers import folder_content

from t2i.errors import UserError, nearest_path
from t2i.fields import all_optional
from t2i.files import (
    partial_folder,
    read_json,
    read_json_lines,
    replacing,
    replacing_folder,
    saving,
    writable_file,
    writable_folder,
)
from t2i.ownership import owning, remove_leftovers
from t2i.processes import Processes
from t2i.sampling import SamplingConfig, SamplingOverrides


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with replacing_folder(folder) as partial:
            assert partial == partial_folder(folder)
            (partial / "below").mkdir()
            (partial / "below" / text).write_text(text)
    whole = folder_content(folder)
    assert list(whole) == ["below/second"]
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), replacing_folder(folder) as partial:
            (partial / "third").touch()
            raise error
    assert folder_content(folder) == whole and os.listdir(tmp_path) == ["folder"]
    inside = replacing_folder(folder / "below" / "second" / "third")
    with pytest.raises(UserError, match=r"cannot write .*third"), inside:
        pass


def test_a_folder_is_flushed_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut, a folder that looks complete is complete."""
    calls, real = [], (os.fsync, os.rename)
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or real[0](file))
    monkeypatch.setattr(os, "rename", lambda *names: calls.append("rename") or real[1](*names))
    with replacing_folder(tmp_path / "folder") as partial:
        for name in ("a", "b"):
            (partial / name).write_text(name)
    assert calls == ["sync", "sync", "rename"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_permissions_of_the_umask(umask, mode, tmp_path):
    """safetensors gives permissions to the owner only, so nobody else used to be able to read a
    run's weights.
    """

    def write(path: Path) -> None:
        path.touch(mode=0o600)
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "folder") as partial:
            write(partial / "weights")
            (partial / "program").touch()
            (partial / "program").chmod(0o755)
        with replacing(tmp_path / "shard") as temporary:
            temporary.unlink(missing_ok=True)
            write(temporary)
    finally:
        os.umask(before)
    for path in (tmp_path / "folder" / "weights", tmp_path / "shard"):
        assert path.stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder" / "program").stat().st_mode & 0o755 == 0o755, (
        "no permission is removed"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_numpys_error_on_a_full_disk_is_translated(tmp_path):
    """numpy's error does not name the full disk, so drawing classes used to end in a traceback."""
    refused = pytest.raises(UserError, match="cannot write x: no space is left")
    with refused, saving("x"), open("/dev/full", "wb", buffering=0) as file:
        np.zeros(100_000).tofile(file)
    with pytest.raises(RuntimeError, match="requested and"), saving("x"):
        raise RuntimeError("12 GB requested and not available on the device")


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "Free some and"), (errno.EACCES, "Choose another place")]
)
def test_a_folder_that_cannot_be_made_is_reported(number, advice, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path / 'a'}: .*{advice}"):
        writable_folder(tmp_path / "a")


def test_waiting_continues_while_files_appear(tmp_path, monkeypatch):
    paths, now = [tmp_path / name for name in "abc"], 0.0

    def sleep(seconds):
        nonlocal now
        now += 8
        next(path for path in paths if not path.exists()).touch()

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    Processes(patience=10).wait_for(paths)
    assert now == 24, "longer than the patience, which restarts with every file"
    with pytest.raises(TimeoutError, match=r"waited -1 s for the hash of a .*\(2 missing\)"):
        Processes(patience=-1).wait_until_none(lambda: ["a", "b"], "the hash of ")


def test_overrides_have_the_fields_of_the_settings(monkeypatch):
    assert [f.name for f in fields(SamplingOverrides)] == [f.name for f in fields(SamplingConfig)]
    assert SamplingOverrides().apply(SamplingConfig(top_k=5)) == SamplingConfig(top_k=5)
    changed = SamplingOverrides(top_k=0, cfg_scale=2.0).apply(SamplingConfig(top_k=5))
    assert changed == SamplingConfig(cfg_scale=2.0)
    with pytest.raises(UserError, match="top_p=7"):
        SamplingOverrides(top_p=7).check()


def test_all_optional_keeps_fields_and_their_docs():
    @dataclass(frozen=True)
    class Settings:
        a: int
        """The first."""
        b: tuple[float, ...] = (1.0,)
        """The second."""

    @all_optional(Settings)
    class Changes:
        """Of the settings."""

        def given(self) -> set[str]:
            return {name for name, value in vars(self).items() if value is not None}

    assert Changes.__doc__ == "Of the settings." and Changes(b=(2.0,)).given() == {"b"}
    assert get_type_hints(Changes) == {"a": int | None, "b": tuple[float, ...] | None}
    hint = get_type_hints(Changes, include_extras=True)["a"]
    assert "The first." in repr(hint.__metadata__)


def test_json_lines_end_only_at_line_feeds(tmp_path):
    """Prompts may contain Unicode's line separators, which results files keep as they are."""
    row, path = {"prompt": "a\u2028b\u0085c"}, tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_json_lines(path) == [row]
    path.write_text("{}\n[]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl line 2 is not a JSON object"):
        read_json_lines(path)


@pytest.mark.parametrize("content", [b'{"a": ["\\ud83d"]}', b'{"\xed\xa0\xbd": 1}'])
def test_half_a_character_is_refused_when_it_is_read(tmp_path, content):
    """It used to end in a UnicodeEncodeError when the text was written again, much later."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for read in (read_json, read_json_lines):
        with pytest.raises(UserError, match=r"a\.json .*(surrogates not allowed|not UTF-8)"):
            read(path)


def test_a_lock_that_cannot_be_taken_is_named(tmp_path):
    """In a shared folder, the lock may belong to another user."""
    (tmp_path / ".lock").mkdir()
    said = pytest.raises(UserError, match=f"cannot write {tmp_path}: Is a directory")
    with said, owning(tmp_path, "output folder"):
        pass


def test_a_refused_command_leaves_no_lock(tmp_path):
    """A hidden .lock stayed in a folder that was there before."""
    (tmp_path / "own.txt").touch()
    for name in ("", "a.npz"):
        with owning(tmp_path, "output folder", name):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]
    with owning(tmp_path, "output folder"):
        (tmp_path / "new.txt").touch()
    assert (tmp_path / ".lock").exists()
    with owning(tmp_path, "output folder"):
        pass
    assert (tmp_path / ".lock").exists(), "it is not this command's"


def test_only_temporary_files_of_killed_programs_are_removed(tmp_path):
    """Those of a program at work in a folder below, and those of other programs, stay."""
    mine, other = tmp_path / "mine", tmp_path / "mine" / "other"
    for folder in (mine / "samples", other):
        folder.mkdir(parents=True)
        (folder / "page.html.0123abcd.tmp").touch()
    (mine / "samples" / ".tmpA1b2C3").touch()  # by safetensors
    stays = {mine / "notes.tmp", mine / ".tmpA1b2C3", other / "page.html.0123abcd.tmp"}
    for path in stays:
        path.touch()
    with owning(mine, "folder"), owning(other, "run folder"):
        remove_leftovers(mine)
    assert set(mine.rglob("*.tmp*")) == stays
    remove_leftovers(mine)
    assert set(mine.rglob("*.tmp*")) == {mine / "notes.tmp", mine / ".tmpA1b2C3"}


def test_the_nearest_path_is_named(tmp_path):
    (tmp_path / "runs" / "mine" / "best").mkdir(parents=True)
    for wrong, meant in (
        ("runs/mine/bset", "runs/mine/best"),
        ("runs/mien/best", "runs/mine/best"),
        ("rums/mine/first", "runs"),
    ):
        assert nearest_path(tmp_path / wrong) == f"; perhaps you meant {tmp_path / meant}"
    for nothing in ("runs/x/best", "runs/mine", "runs/mine/best/z"):
        assert nearest_path(tmp_path / nothing) == ""
    (tmp_path / "best").symlink_to("gone")  # used to be told "perhaps you meant" the same name
    for through in ("best", "best/codec"):
        assert nearest_path(tmp_path / through) == (
            f"; {tmp_path / 'best'} is a link to gone, which does not exist"
        )


def test_a_link_to_nothing_is_not_replaced_by_an_output(tmp_path):
    """A disk that is not mounted: the results used to be written elsewhere without a word."""
    for name in ("gone", "itself"):
        (tmp_path / "itself").unlink(missing_ok=True)
        (tmp_path / "itself").symlink_to(name)
        for check in (writable_file, writable_folder):
            with pytest.raises(UserError, match=f"itself is a link to {name}, which does not"):
                check(tmp_path / "itself")
    assert writable_file(tmp_path / "new" / "a.json", make=False).name == "a.json"
    assert not (tmp_path / "new").exists()

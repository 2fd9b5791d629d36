"""Cases 7, 10, 11: data are identified by their content, a name has one meaning, and the place of
the cache is checked first.
"""

import os
import shutil
import time

import pytest
from helpers import in_threads, open_source
from test_data_sources import (
    CAPTIONS,
    make,
    png,
    private_datasets_cache,  # noqa: F401
    write_images,
    write_metadata,
    write_parquet,
    write_tar,
)
from test_data_store import build, encode_images

from t2i import published
from t2i.checkpoint import load_model
from t2i.checkpoint_folders import is_checkpoint
from t2i.data import content, encoding
from t2i.data.content import ABSENT, contents_key, describe_changes, hash_files
from t2i.data.data_report import survey_source
from t2i.data.encoding import check_cache_dir
from t2i.data.images import ImageRules, SkipSample
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.processes import Processes
from t2i.shapes.shapes_source import parse_shapes


# -- 10: a data set is its content -----------------------------------------------------------------
@pytest.mark.parametrize("kind", ["metadata", "sidecar", "parquet", "webdataset"])
def test_place_and_clock_do_not_matter(kind, tmp_path, monkeypatch):
    """Case 10: touched, moved, a slash more, another working directory: the same cache."""
    folder = build(open_source(make(kind, tmp_path / "data")), tmp_path / "cache")
    for path in (tmp_path / "data").rglob("*"):
        os.utime(path, (1, 1))
    shutil.move(tmp_path / "data", tmp_path / "other" / "place")
    monkeypatch.chdir(tmp_path / "other")

    def never(pixels):
        raise AssertionError("encoded again")

    for name in ("place", "place/", "../other/place", tmp_path / "other" / "place"):
        assert build(open_source(name), tmp_path / "cache", images=never) == folder


@pytest.mark.parametrize("kind", ["metadata", "sidecar", "parquet", "webdataset"])
def test_any_edit_matters(kind, tmp_path):
    """Case 10: changing one byte of any file, even with the old size and times, makes another data
    set.
    """
    data = make(kind, tmp_path / "data")
    source = open_source(data)
    before = hash_files(source.files(), tmp_path / "cache")
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        bytes_, times = path.read_bytes(), path.stat()
        half = len(bytes_) // 2
        path.write_bytes(bytes_[:half] + bytes([bytes_[half] ^ 1]) + bytes_[half + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        after = hash_files(source.files(), tmp_path / "cache")
        name = path.relative_to(data)
        assert describe_changes(before, after) == f"1 file was edited ({name})"
        listed = source.files()
        path.unlink()
        gone = hash_files(listed, tmp_path / "cache")
        assert describe_changes(before, gone) == f"1 file was removed ({name})"
        assert describe_changes(gone, before) == f"1 file was added ({name})"
        path.write_bytes(bytes_)


def test_images_elsewhere_are_content_too(tmp_path):
    """Case 10: files outside the folder that metadata.jsonl or a table names."""
    write_images(tmp_path / "images")
    rows = [{"file_name": f"../images/{i}.png", "text": "x"} for i in range(3)]
    write_metadata(tmp_path / "data", rows)
    write_parquet(
        tmp_path / "images" / "0.parquet",
        {"image": ["0.png", "1.png", "gone.png"], "text": CAPTIONS},
    )
    for given in (tmp_path / "data", tmp_path / "images" / "0.parquet"):
        source = open_source(given, outside_images=True)
        first = build(source, tmp_path / "cache")
        (tmp_path / "images" / "1.png").write_bytes(png(9))
        with pytest.raises(
            UserError, match=r"has changed since .*: 1 file was edited \(.*1\.png\)\)"
        ):
            build(
                open_source(given, outside_images=True), tmp_path / "cache", expected_key=first.name
            )
        assert build(open_source(given, outside_images=True), tmp_path / "cache") != first
        (tmp_path / "images" / "1.png").write_bytes(png(1))
        assert (
            build(
                open_source(given, outside_images=True), tmp_path / "cache", expected_key=first.name
            )
            == first
        )


@pytest.mark.parametrize("kind", ["metadata", "webdataset"])
def test_other_columns_are_other_data(kind, tmp_path):
    """Case 10: the files are the same, but not the captions that are read."""
    data, names = tmp_path / "data", ("caption", "text" if kind == "metadata" else "txt")
    if kind == "metadata":
        write_images(data)
        rows = [{"file_name": f"{i}.png", "caption": "a", "text": "b"} for i in range(3)]
        write_metadata(data, rows)
    else:
        parts = [(f"{i}.png", png(i)) for i in range(3)]
        parts += [(f"{i}.{name}", name) for i in range(3) for name in names]
        write_tar(data / "0.tar", dict(sorted(parts)))
    sources = [open_source(data, caption_column=name) for name in names]
    assert len({build(source, tmp_path / "cache") for source in sources}) == 2


def test_the_same_images_in_another_class_are_other_data():
    """Case 10: the order of the images is the same, but not their classes."""
    keys = {contents_key([("a/1", "x"), (f"{name}/2", "y")]) for name in "ab"}
    assert len(keys) == 2


def test_changes_are_named(tmp_path):
    """Case 10: the changed files, or the changed settings, or that the change cannot be told."""
    data = make("sidecar", tmp_path / "data")
    key = build(open_source(data), tmp_path / "cache").name
    with pytest.raises(UserError, match=r"resolution: 8 -> 4"):
        build(open_source(data), tmp_path / "cache", expected_key=key, rules=ImageRules(4))
    (data / "0.txt").write_text("edited")
    (data / "1.png").unlink()
    write_images(data, 7)
    (data / "1.png").unlink()
    with pytest.raises(UserError) as caught:
        build(open_source(data), tmp_path / "cache", expected_key=key)
    assert (
        "1 file was edited (0.txt), 4 files were added (3.png, 4.png, 5.png, and 1 more), 2 files were"
        in str(caught.value)
    )
    with pytest.raises(UserError, match=r"none is gone or of another version"):
        build(open_source(data), tmp_path / "cache", expected_key="none")


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    """Case 10: the index saves reading a million images again, but does not trust files changed
    just now.
    """
    monkeypatch.setattr(content, "_WORTH_AN_INDEX", 0)
    monkeypatch.setattr(published, "_SETTLED", 10**7)
    source = open_source(make("metadata", tmp_path / "data"))
    read = []
    monkeypatch.setattr(
        content, "file_sha256", lambda path: read.append(path.name) or str(hash(path.read_bytes()))
    )
    time.sleep(0.05)
    first = hash_files(source.files(), tmp_path)
    assert len(read) == 4 and hash_files(source.files(), tmp_path) == first and len(read) == 4
    path = tmp_path / "data" / "images" / "1.png"
    shutil.copy2(tmp_path / "data" / "images" / "2.png", path)
    assert hash_files(source.files(), tmp_path) != first
    assert read[4:] == ["1.png"]
    hash_files(source.files(), tmp_path)
    assert read[5:] in ([], ["1.png"]), "read again: it changed just before"
    time.sleep(0.05)
    ranks = in_threads(lambda r: hash_files(source.files(), tmp_path, Processes(r, 2, patience=20)))
    assert ranks[0] == ranks[1] == hash_files(source.files(), tmp_path)
    assert set(read[5:]) <= {"1.png"}
    path.unlink()
    assert dict(hash_files(source.files(), tmp_path))["images/1.png"] == ABSENT
    (index,) = (tmp_path / "file_hashes").iterdir()
    index.write_text("{")
    assert len(hash_files(source.files(), tmp_path)) == 4
    with pytest.raises(TimeoutError, match=r"the hashes in .*\(1 missing\)"):
        path.write_bytes(png(5))
        hash_files(source.files(), tmp_path, Processes(1, 2, patience=0.1))
    monkeypatch.setattr(published, "_SETTLED", 10**13)  # all files changed just now
    read.clear()
    for rank in (0, 1, 0):
        hash_files(source.files(), tmp_path, Processes(rank, 2, patience=0.1))
    assert len(read) == 8, "by the main process, each time"


# -- 11: names -------------------------------------------------------------------------------------
def test_a_folder_of_a_shipped_name(tmp_path, monkeypatch):
    """Case 11: a bare name means the kit's data, ./name the folder; if both exist, a message says
    so.
    """
    monkeypatch.chdir(tmp_path)
    assert parse_shapes("shapes").remarks == []
    make("sidecar", tmp_path / "shapes")
    report, _ = survey_source(parse_shapes("shapes"), rules=ImageRules(64), limit=1)
    assert (
        "'shapes' is taken for the scenes that the kit draws; write './shapes'" in report.describe()
    )
    assert parse_shapes("./shapes") is None and open_source("./shapes").length == 3


def test_a_run_of_a_shipped_name(tmp_path, monkeypatch, caplog):
    """Case 11, for models: the run is given as ./shapes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes" / "checkpoints").mkdir(parents=True)
    (tmp_path / "shapes" / "config.json").write_text("{}")
    assert is_checkpoint("./shapes") and not is_checkpoint("shapes")
    assert load_model("shapes").config.k == 1
    assert "'shapes' is taken for the base that the kit ships; write './shapes'" in caplog.text


# -- 7: the cache's place --------------------------------------------------------------------------
def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    """Case 7: while a shard is written, whichever library raises the error."""

    def full(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("Error while serializing: IoError(Os { code: 28, ... os error 28 })")

    monkeypatch.setattr("t2i.data.shards.save_file", full)
    source = open_source(make("sidecar", tmp_path / "data"))
    with pytest.raises(UserError, match=r"shard_00000\.safetensors: no space is left on the disk"):
        build(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_an_unwritable_cache_is_noticed_first(tmp_path):
    """Case 7: before anything is encoded, and (see `check_cache_dir`) before a model is loaded."""
    source = open_source(make("sidecar", tmp_path / "data"))
    seen = []
    for place in (tmp_path / "data" / "0.txt", tmp_path / "data" / "0.txt" / "cache"):
        with pytest.raises(UserError, match="cannot write to"):
            check_cache_dir(place)
        with pytest.raises(UserError, match="cannot write to"):
            build(source, place, images=lambda p: seen.append(p) or encode_images(p))
    assert not seen
    check_cache_dir(tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["edit", "remove", "caption", "everything"])
def test_data_that_change_while_they_are_encoded_are_not_kept(tmp_path, monkeypatch, change):
    """If a drive was unmounted meanwhile, its images used to be missing for good from a cache that
    counted as complete.
    """
    data, cache = make("sidecar", tmp_path / "data"), tmp_path / "cache"
    copy = shutil.copytree(data, tmp_path / "copy")
    source, hashed = open_source(data), encoding.hash_files

    def hash_and_change(*given):
        found = hashed(*given)
        os.utime(data / "2.png")  # only touched: not a change
        for path in {"edit": [data / "0.png"], "everything": [*data.iterdir()]}.get(change, ()):
            path.write_bytes(b"")
        if change in ("remove", "caption"):
            (data / f"0.{'png' if change == 'remove' else 'txt'}").unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "hash_files", hash_and_change)
        with pytest.raises(UserError, match=r"changed while it was encoded \(\d files? w"):
            build(source, cache)
    shutil.rmtree(data)
    shutil.copytree(copy, data)
    assert len(CodeStore(build(open_source(data), cache))) == 3


@pytest.mark.parametrize("kind", ["sidecar", "webdataset txt"])
def test_storage_that_fails_while_data_are_encoded_loses_no_sample(tmp_path, monkeypatch, kind):
    """The image used to be missing for good from a cache that counted as complete."""
    source, cache = open_source(make(kind, tmp_path / "data")), tmp_path / "cache"

    def fail(where, limit=None):
        raise SkipSample("unreadable", "[Errno 5] Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("t2i.data.images.read_bytes", fail)
        with pytest.raises(UserError, match=r"now cannot be: \[Errno 5\] Input/output error"):
            build(source, cache)
    assert len(CodeStore(build(source, cache))) == 3


def test_a_check_for_changes_reads_no_unchanged_file_and_a_finished_store_needs_none(
    tmp_path, monkeypatch
):
    """A million files: no second reading after encoding, and no second look at them later."""
    source, cache = open_source(make("sidecar", tmp_path / "data")), tmp_path / "cache"
    monkeypatch.setattr(content, "_WORTH_AN_INDEX", 0)
    monkeypatch.setattr(published, "_SETTLED", -(10**18))
    read, seen, hash_one, status = [], [], content._hash, content.file_status
    monkeypatch.setattr(content, "_hash", lambda path: read.append(path) or hash_one(path))
    monkeypatch.setattr(content, "file_status", lambda path: seen.append(path) or status(path))
    build(source, cache)
    assert len(read) == len(source.files()) and len(seen) == 2 * len(read)
    build(source, cache)
    assert len(seen) == 3 * len(read), "only the hashes of the key"


def test_a_store_that_another_run_finished_with_changed_data_is_discarded_whole(tmp_path):
    """Without its shards, a manifest that another run wrote would stop every later run."""
    data = make("sidecar", tmp_path / "data")

    def finish_and_change(pixels):
        (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/source.json"))
        (folder / "manifest.json").write_text("{}")
        (data / "0.txt").write_text("another caption")
        return encode_images(pixels)

    with pytest.raises(UserError, match=r"changed while it was encoded \(1 file was edited"):
        build(open_source(data), tmp_path / "cache", images=finish_and_change)
    left = {path.suffix for path in (tmp_path / "cache").glob("*/*")}
    assert left == {".json", ".jsonl"} and not [*tmp_path.glob("cache/*/manifest.json")]

"""Cases 12, 13, 17, 18, 28: faults that data sets often have, and what happens with each."""

import os
import shutil
import socket
import unicodedata
import warnings

import pytest
import torch
from helpers import open_source
from PIL import Image
from test_data_sources import (
    image_structs,
    levels,
    make,
    png,
    private_datasets_cache,  # noqa: F401
    write_images,
    write_metadata,
    write_parquet,
    write_tar,
)
from test_data_store import build, report_of

from t2i import cli
from t2i.data.data_report import survey_source
from t2i.data.images import ImageRules
from t2i.data.order import split_indices
from t2i.data.store import CodeStore
from t2i.errors import UserError


# -- 12: the held-out split ------------------------------------------------------------------------
def several_rows(kind, folder):
    """Three images with five samples each, in every form that shows that the image is the same."""
    images = [i for i in range(3) for _ in range(5)]
    captions = [f"{i} {j}" for j, i in enumerate(images)]
    if kind == "metadata":
        write_images(folder)
        rows = zip(images, captions, strict=True)
        write_metadata(folder, [{"file_name": f"{i}.png", "text": c} for i, c in rows])
    elif kind == "copies":
        folder.mkdir()
        for j, i in enumerate(images):
            (folder / f"{j:02d}.png").write_bytes(png(i))
            (folder / f"{j:02d}.txt").write_text(captions[j])
    elif kind == "parquet":
        structs = [image_structs()[i] for i in images]
        write_parquet(folder / "0.parquet", {"image": structs, "text": captions})
    else:
        members = [(f"{j}.png", png(i)) for j, i in enumerate(images)]
        texts = [(f"{j}.txt", caption) for j, caption in enumerate(captions)]
        pairs = zip(members, texts, strict=True)
        write_tar(folder / "0.tar", dict(member for pair in pairs for member in pair))
    return folder


@pytest.mark.parametrize("kind", ["metadata", "copies", "parquet", "webdataset"])
def test_rows_of_one_image_are_held_out_together(kind, tmp_path):
    """Case 12: several rows of an image are several samples, all on the same side of the split."""
    source = open_source(several_rows(kind, tmp_path / "data"))
    cache = CodeStore(build(source, tmp_path / "cache"))
    same = cache.same_images()
    first = same[::5].repeat_interleave(5)  # of each image
    assert len(cache) == 15 and torch.equal(same, first) and len(same.unique()) == 3
    train, held_out = split_indices(15, 3, 0, same)
    assert len(held_out) == 5 and len(train) == 10
    assert not set(same[train].tolist()) & set(same[held_out].tolist())
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(15))
    with pytest.raises(UserError, match=r"cannot hold out 11 of 15 .* only 3 different images"):
        split_indices(15, 11, 0, same)


def test_the_split_of_different_images_has_not_changed():
    """Case 12: without repeated images, the split is the same as before."""
    for n, held in ((20, 1), (100, 37)):
        for a, b in zip(
            split_indices(n, held, 3), split_indices(n, held, 3, torch.arange(n)), strict=True
        ):
            assert torch.equal(a, b)


# -- 13: sub-folders -------------------------------------------------------------------------------
def sidecars(folder, count=2):
    write_images(folder, count)
    for i in range(count):
        (folder / f"{i}.txt").write_text("x")


def test_classes_named_as_splits(tmp_path):
    """Case 13: a folder named train is a class next to bus, but a split next to val. What is left
    out is reported.
    """
    for name in ("bus", "train", "cat"):
        sidecars(tmp_path / "cl" / name)
    source = open_source(tmp_path / "cl")
    assert source.length == 6 and source.left_out == []
    assert (
        "(bus, cat, train)" in source.remarks[0] and "cl/train to use it alone" in source.remarks[0]
    )
    for name in ("Train", "val", "TEST"):
        sidecars(tmp_path / "splits" / name)
    source = open_source(tmp_path / "splits")
    assert source.length == 2 and source[0].key == "0.png"
    assert source.left_out == [
        ("TEST/ (2 files)", "not of the split train"),
        ("val/ (2 files)", "not of the split train"),
    ]
    assert open_source(tmp_path / "splits", split="val").length == 2
    assert open_source(tmp_path / "cl", split="train").length == 6
    for name in ("train-0", "bus", "val"):
        write_tar(tmp_path / "tars" / f"{name}.tar", {"a.png": png(0), "a.txt": "x"})
    source = open_source(tmp_path / "tars")
    assert source.length == 2 and source.left_out == [("val.tar", "not of the split train")]
    with pytest.raises(UserError, match=r"split 'test', but bus\.tar"):
        open_source(tmp_path / "tars", split="test")


def test_splits_that_a_user_may_not_mean(tmp_path):
    """Case 13: folders that are named like splits but are used all the same are reported."""
    for name in ("no_train/val", "no_train/test", "classes/test", "classes/dog"):
        sidecars(tmp_path / name)
    source = open_source(tmp_path / "no_train")
    assert source.length == 4 and "(test, val), since none is named train" in source.remarks[0]
    source = open_source(tmp_path / "classes")
    assert source.length == 4 and "give " + str(tmp_path / "classes/test") in source.remarks[0]
    for name in ("train", "val"):
        sidecars(tmp_path / "deep" / "data" / name)
    source = open_source(tmp_path / "deep")
    assert source.length == 2 and source[0].key == "0.png" and source.remarks == []
    assert source.left_out == [("val/ (2 files)", "not of the split train")]
    assert open_source(tmp_path / "deep", split="val").length == 2
    sidecars(tmp_path / "one" / "dog")
    assert open_source(tmp_path / "one")[0].key == "dog/0.png"


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (("test_images", "train_images"), "train_images"),
        (("seg_pred", "seg_test", "seg_train"), "seg_train"),
        (("TestSet", "TrainSet"), "TrainSet"),
        (("cats/test", "cats/train", "dogs/test", "dogs/train"), "cats/train"),
    ],
)
def test_splits_that_are_not_recognized_are_reported(tmp_path, names, first):
    """Case 13: the test images of such folders were trained on without a word."""
    for name in names:
        sidecars(tmp_path / name)
    source = open_source(tmp_path)
    assert source.length == 2 * len(names)
    assert f"give {tmp_path}/{first} to use it alone" in source.remarks[0]


def test_a_word_that_is_a_split_is_no_split(tmp_path):
    for name in ("crash_test", "bus_station", "cars"):
        sidecars(tmp_path / name / "images")
    assert open_source(tmp_path).remarks == []


def test_repeats_of_kohyas_folders_are_not_read(tmp_path):
    for name in ("10_sks dog", "2024_dog", "01_dog"):
        sidecars(tmp_path / "img" / name)
    assert open_source(tmp_path / "img" / "2024_dog").remarks == []
    assert open_source(tmp_path).remarks == [
        "the number in 10_sks dog/ is not read: an epoch has every image once, not as often as the "
        "names of kohya's folders say"
    ]


def test_missing_files_of_a_set(tmp_path):
    """Files that count themselves, as the hub names them: a download may have been interrupted."""
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00002"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": png(1), "0.txt": "a dot"})
    assert open_source(tmp_path).remarks == [
        "2 of the 3 files such as train-00000-of-00003.tar are there: was a download or a copy "
        "interrupted?"
    ]
    assert open_source(tmp_path / "train-00000-of-00003.tar").remarks == []
    write_tar(tmp_path / "train-00001-of-00003.tar", {"0.png": png(1), "0.txt": "a dot"})
    assert open_source(tmp_path).remarks == []


def test_an_image_beside_splits(tmp_path):
    """Case 13: one image next to splits makes them all one data set, the test set too; this is
    reported with its reason.
    """
    for name in ("train", "test"):
        sidecars(tmp_path / name)
    assert open_source(tmp_path).length == 2
    (tmp_path / "cover.png").write_bytes(png(1))
    source = open_source(tmp_path)
    assert source.length == 5
    assert source.remarks == [
        f"all sub-folders of {tmp_path} are used (test, train), since cover.png is next to them; "
        f"give {tmp_path}/train to use it alone"
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/0.png", "text": "a dot"}')
    assert "leave the others out of metadata.jsonl" in open_source(tmp_path).remarks[-1]
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"not used as splits, since cover\.png .*; give .*/test without"
    ):
        open_source(tmp_path, split="test")
    with pytest.raises(UserError, match=r"has no sub-folder for the split 'val'$"):
        open_source(tmp_path, split="val")
    for split in ("train", "test"):
        write_images(tmp_path / "named" / f"{split}_images", 2)
    with pytest.raises(UserError, match=r"the split 'testing'; give .*/test_images without"):
        open_source(tmp_path / "named", split="testing")


def test_metadata_that_is_not_read_is_named(tmp_path):
    """Case 13: a metadata.csv next to sidecar captions, which the datasets library would have
    used.
    """
    sidecars(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,another\n")
    (tmp_path / "0.json").write_text("{}")
    said = "captions are in the .txt files next to the images"
    assert open_source(tmp_path).remarks == [f"metadata.csv is not read: {said}"]
    (tmp_path / "captions.jsonl").write_text("{}")
    (tmp_path / "info.json").write_text("{}")
    names = "captions.jsonl, metadata.csv"
    assert open_source(tmp_path).remarks == [f"{names} are not read: {said}"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dot"}')
    said = f"{names} are not read: captions are in metadata.jsonl"
    assert open_source(tmp_path).remarks[-1] == said


def test_ignored_folders_are_reported(tmp_path):
    """Case 13: hidden folders with images, and images that metadata.jsonl does not name."""
    sidecars(tmp_path)
    sidecars(tmp_path / ".ipynb_checkpoints")
    sidecars(tmp_path / "__MACOSX")
    sidecars(tmp_path / "@eaDir")
    (tmp_path / ".git").mkdir()
    source = open_source(tmp_path)
    assert source.length == 2
    assert source.left_out == [
        (".ipynb_checkpoints/", "hidden folder"),
        ("@eaDir/", "hidden folder"),
        ("__MACOSX/", "hidden folder"),
    ]
    write_metadata(tmp_path, [{"file_name": "0.png", "text": "x"}])
    sidecars(tmp_path / "more", 1)
    names = [name for name, reason in open_source(tmp_path).left_out if reason == "not in metadata"]
    assert names == ["1.png", "more/0.png"]


# -- 17: names in tars -----------------------------------------------------------------------------
def test_repeated_names_in_a_tar(tmp_path):
    """Case 17: both samples are kept and reported."""
    write_members(
        tmp_path / "0.tar",
        [("a.png", png(0)), ("a.txt", "x"), ("a.png", png(1)), ("a.txt", "y"), ("b.c.png", png(2))],
    )
    write_members(tmp_path / "1.tar", [("a.PNG", png(3)), ("a.txt", "z"), ("._a.png", b"fork")])
    source = open_source(tmp_path)
    assert levels(source) == [0, 1, "no caption", 3]
    assert [s.captions for s in source] == [["x"], ["y"], [], ["z"]]
    assert [s.key for s in source] == ["0.tar:a", "0.tar:a", "0.tar:b", "1.tar:a"]
    assert source.left_out == [("1.tar:._a.png", "hidden file")]
    report = report_of(build(source, tmp_path / "cache"))
    assert report["noted"] == {"name repeats in the tar": {"count": 1, "first": ["0.tar:a"]}}
    write_members(tmp_path / "1.tar", [("a.b.png", png(3)), ("a.b.txt", "z")])
    with pytest.raises(UserError, match="A sample's name ends at the first dot"):
        open_source(tmp_path / "1.tar")


def write_members(path, members):
    """Write a tar whose names may repeat."""
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# -- 18: links and names ---------------------------------------------------------------------------
def test_odd_files_are_left_out_and_named(tmp_path):
    """Case 18: broken links, loops, pipes, sockets, names that are not text, empty files."""
    data = tmp_path / "data"
    sidecars(data, 1)
    sidecars(tmp_path / "linked", 1)
    (data / "zz.png").symlink_to("/gone")
    (data / "self.png").symlink_to("self.png")
    (data / "loop").symlink_to(data)
    (data / "up").symlink_to(tmp_path)
    (data / "beside").symlink_to(tmp_path / "linked")
    (data / "again").symlink_to(tmp_path / "linked")
    os.mkfifo(data / "pipe.png")
    os.mkfifo(data / "0.pipe.txt")
    for name in (b"bad\xff", b"two\nlines", b"x" * 250):
        shutil.copy(data / "0.png", os.fsencode(data) + b"/" + name + b".png")
        shutil.copy(data / "0.txt", os.fsencode(data) + b"/" + name + b".txt")
    (data / "empty.png").touch()
    (data / "empty.txt").write_text("x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(data / "s.png"))
        source = open_source(data)
    folder = build(source, tmp_path / "cache")
    assert len(CodeStore(folder)) == 5
    report = report_of(folder)
    skipped = {reason: entry["first"] for reason, entry in report["skipped"].items()}
    assert skipped == {
        "broken link": ["self.png", "zz.png"],
        "empty": ["empty.png"],
        "link to a folder that was already read": ["beside/", "loop/", "up/"],
        "not a regular file": ["0.pipe.txt", "pipe.png", "s.png"],
    }
    keys = {CodeStore(folder).name(i) for i in range(5)}
    assert {"bad\\udcff.png", "two\\nlines.png", "again/0.png"} < keys
    print(report["lines"])  # can be printed


def test_named_pipes_do_not_hang(tmp_path):
    """Case 18: named by a row of metadata.jsonl, or given as the data set."""
    os.mkfifo(tmp_path / "p.tar")
    write_images(tmp_path / "data", 1)
    os.mkfifo(tmp_path / "data" / "pipe.png")
    rows = [{"file_name": name, "text": "x"} for name in ("pipe.png", "0.png", "a\0b", "\ud83d")]
    write_metadata(tmp_path / "data", rows)
    source = open_source(tmp_path / "data")
    assert levels(source) == ["unreadable", 0, "unreadable", "unreadable"]
    assert len(CodeStore(build(source, tmp_path / "cache"))) == 1
    with pytest.raises(UserError, match=r"p\.tar is not a file"):
        open_source(tmp_path / "p.tar")


def test_empty_and_broken_tars_among_others(tmp_path):
    """Case 18: an empty file and a dangling link are left out, and nothing else."""
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.txt": "x"})
    (tmp_path / "1.TAR").touch()
    (tmp_path / "2.tar").symlink_to("/gone")
    source = open_source(tmp_path)
    assert source.length == 1
    assert source.left_out == [("2.tar", "broken link"), ("1.TAR", "empty")]
    assert open_source(f"{tmp_path}/*.tar").left_out == [("2.tar", "broken link")]


def test_a_cache_hit_reports_the_files_of_today(tmp_path):
    """Case 18: other files next to the samples are not part of the key, but of the report."""
    data = make("sidecar", tmp_path / "data")
    folder = build(open_source(data), tmp_path / "cache")
    assert CodeStore(folder).manifest["report"]["lines"] == []
    (data / "zz.png").symlink_to("/gone")
    assert build(open_source(data), tmp_path / "cache") == folder
    assert CodeStore(folder).manifest["report"]["lines"] == ["1 broken link (zz.png)"]
    assert report_of(folder)["skipped"]["broken link"]["first"] == ["zz.png"]


@pytest.mark.parametrize("what", ["missing", "cut"])
@pytest.mark.parametrize("suffix", ["safetensors", "jsonl"])
def test_a_damaged_shard_says_what_to_do(tmp_path, what, suffix):
    """After a full disk or a clean-up: it used to be a RuntimeError about a view, or a
    FileNotFoundError.
    """
    folder = build(open_source(make("sidecar", tmp_path / "data")), tmp_path / "cache")
    path = folder / f"shard_00000.{suffix}"
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    store = CodeStore(folder)
    message = rf"{path.name} is missing or damaged .*Delete {folder} and start again"
    with pytest.raises(UserError, match=message):
        _ = store.codes([0]) if suffix == "safetensors" else store.condition(0)
    (tmp_path / "data" / "zz.png").symlink_to("/gone")  # so that the report is remade
    build(open_source(tmp_path / "data"), tmp_path / "cache")


@pytest.mark.parametrize("content", ["{}", "[1]", "{", "", '{"key": {"format": 4}}'])
def test_a_damaged_manifest_says_what_to_do(tmp_path, content):
    """It used to be a traceback, or the advice to copy it again."""
    source = open_source(make("sidecar", tmp_path / "data"))
    folder = build(source, tmp_path / "cache")
    (folder / "manifest.json").write_text(content)
    message = rf"manifest.json is missing or damaged .*Delete {folder} and start again"
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        CodeStore(folder)


def test_shards_of_six_digits_keep_their_order(tmp_path):
    """Remaking the report used to reorder the samples: 100000 sorts before 99999 as text."""
    source = open_source(make("sidecar", tmp_path / "data"))
    folder = build(source, tmp_path / "cache", shard_size=2)
    before = CodeStore(folder).codes([0, 1, 2])
    for old, new in (("00001", "100000"), ("00000", "99999")):
        for path in folder.glob(f"shard_{old}.*"):
            path.rename(path.with_stem(f"shard_{new}"))
    (tmp_path / "data" / "zz.png").symlink_to("/gone")
    build(open_source(tmp_path / "data"), tmp_path / "cache", shard_size=2)
    assert torch.equal(CodeStore(folder).codes([0, 1, 2]), before)


# -- 28 --------------------------------------------------------------------------------------------
def test_small_images_say_what_is_wanted(tmp_path):
    """Case 28: the message names the size and the option."""
    sidecars(tmp_path)
    Image.new("RGB", (9, 7)).save(tmp_path / "0.png")
    said = survey_source(open_source(tmp_path), rules=ImageRules(8))[0].describe()
    assert (
        said
        == "1 too small (0.png: 9 x 7 px, needs 8; --data.small-images upscale enlarges small images)"
    )


def test_images_of_which_little_remains(tmp_path):
    """A panorama loses most of what its caption says; --check reports it."""
    sidecars(tmp_path)
    survey = survey_source(open_source(tmp_path), rules=ImageRules(8))[0]
    assert survey.lines() == []
    Image.new("RGB", (30, 10)).save(tmp_path / "1.png")
    survey = survey_source(open_source(tmp_path), rules=ImageRules(8))[0]
    assert survey.lines() == [
        "1 have one side more than twice as long as the other (1.png: 30 x 10 px): the center crop "
        "cuts off more than half of them, which their captions may describe"
    ]


def test_archives_next_to_images_are_reported(tmp_path):
    sidecars(tmp_path)
    for name in ("part2.zip", "old.tar.gz"):
        (tmp_path / name).touch()
    said = "old.tar.gz, part2.zip are not unpacked, and not read"
    assert open_source(tmp_path).remarks == [said]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dot"}')
    assert said in open_source(tmp_path).remarks


def test_metadata_of_another_encoding_is_named(tmp_path):
    """For UTF-16, which some editors save, it used to be "not JSON: codec can't decode byte
    0x00".
    """
    write_images(tmp_path)
    rows = "".join(f'{{"file_name": "{i}.png", "text": "café"}}\n' for i in range(3))
    path = tmp_path / "metadata.jsonl"
    for encoding, said in (
        ("utf-16", "metadata.jsonl is UTF-16, not UTF-8: save it as UTF-8"),
        ("latin-1", "line 1 is not UTF-8: save the file as UTF-8"),
    ):
        path.write_bytes(rows.encode(encoding))
        with pytest.raises(UserError, match=said):
            open_source(tmp_path)
    path.write_bytes(rows.encode("utf-8-sig"))
    assert len(list(open_source(tmp_path))) == 3


def test_a_name_that_a_line_has_twice_is_refused(tmp_path):
    """The last one counted, without a word."""
    write_images(tmp_path)
    line = '{"file_name": "0.png", "text": "a dot", "text": "a ring"}'
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1 is not JSON: it has 'text' twice; delete one"):
        open_source(tmp_path)


def test_a_text_table_gets_a_message_about_tables(tmp_path):
    """The message used to point to the folder of images, whose message pointed back."""
    (tmp_path / "a.csv").write_text("file_name,text\n0.png,a dog\n")
    with pytest.raises(UserError, match=r'neither .parquet nor .tar. .*"metadata.jsonl" with one'):
        open_source(tmp_path / "a.csv")


def test_long_names_are_cut_in_reports(tmp_path):
    """A table may name a file of any length, which used to fill the screen."""
    write_images(tmp_path)
    write_metadata(tmp_path, [{"file_name": "x" * 5000, "text": "a"}])
    said = survey_source(open_source(tmp_path), rules=ImageRules(8))[0].describe()
    assert "xxx..." in said and len(said) < 400


def test_pillows_warning_of_large_images_is_not_shown(tmp_path):
    """A DecompressionBombWarning with a line of Pillow's code used to appear next to the kit's own
    report.
    """
    Image.new("1", (9500, 9500)).save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli.run(lambda: None)  # every program starts in this way
        ImageRules(8).load(tmp_path / "a.png")
    assert [str(one.message) for one in shown] == []


def test_tars_that_were_joined(tmp_path):
    """`cat a.tar b.tar`: everything after the end of the first tar used to be lost silently."""
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.txt": "x"})
    assert open_source(tmp_path / "0.tar").left_out == []
    joined = tmp_path / "0.tar"
    joined.write_bytes(joined.read_bytes() * 2)
    source = open_source(joined)
    assert source.length == 1
    [(name, reason)] = source.left_out
    assert name == "0.tar" and "second archive after the end of the first" in reason


@pytest.mark.parametrize("decomposed", ["picture", "other"])
@pytest.mark.parametrize("kind", ["sidecar", "metadata"])
def test_accents_in_two_spellings(tmp_path, kind, decomposed):
    """Disks and zips of a Mac decompose accents: the caption of "é.png" was missing, and "é.png"
    was not in metadata.
    """
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    picture, other = names if decomposed == "other" else reversed(names)
    (tmp_path / f"{picture}.png").write_bytes(png(0))
    if kind == "sidecar":
        (tmp_path / f"{other}.txt").write_text("a cup")
    else:
        write_metadata(tmp_path, [{"file_name": f"{other}.png", "text": "a cup"}])
    source = open_source(tmp_path)
    assert (source.left_out, levels(source)) == ([], [0])
    assert source[0].captions == ["a cup"]
    assert all(path.exists() for _, path in source.files())


def test_an_image_in_two_formats(tmp_path):
    """A conversion can leave a.jpg and a.png: the held-out image would be trained on, with other
    pixels.
    """
    sidecars(tmp_path)
    assert open_source(tmp_path).remarks == []
    Image.open(tmp_path / "1.png").convert("RGB").save(tmp_path / "1.jpg")
    source = open_source(tmp_path)
    assert source.length == 3
    [said] = source.remarks
    assert said.startswith(
        "2 images share captions with another one of the same name, such as 1.jpg and 1.png"
    )

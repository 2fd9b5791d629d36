"""ImageNet as codes: views, extraction that may be killed, several processes."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import Killed, folder_content, in_threads
from PIL import Image
from torchvision import transforms

from t2i.data import array_file, code_array
from t2i.data.array_file import ArrayFile
from t2i.data.code_array import CodeArray
from t2i.data.content import hash_files
from t2i.data.sources import classes as imagenet
from t2i.data.sources.classes import extract_codes, open_imagenet
from t2i.data.views import Views, ten_crop
from t2i.processes import ALONE, Processes
from t2i.rng import integers, make_keys

SIZE = 8


def picture(seed, width=12, height=10):
    pixels = integers(make_keys(seed), 256, height, width, 3).to(torch.uint8).numpy()
    return Image.fromarray(pixels)


@pytest.fixture
def dataset(tmp_path):
    """Three classes with 4, 2 and 3 images; number 5 (n02/1.png) is broken."""
    number = 0
    for name, count in (("n01", 4), ("n02", 2), ("n03", 3)):
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            picture(number).save(folder / f"{i}.png")
            number += 1
    path = tmp_path / "data" / "train" / "n02" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "data"


def encode(pixels):
    """Codes [B, 2, 1]: the red of the first and the green of the last pixel, dark pixels being the
    highest.
    """
    levels = torch.stack([pixels[:, 0, 0, 0], pixels[:, 1, -1, -1]], 1)
    return ((1 - levels) * 127.5).round().long()[..., None]


class Encoder:
    """Counts views; dies before the view with this number."""

    def __init__(self, dies_at=10**9):
        self.seen, self.dies_at = 0, dies_at

    def __call__(self, pixels):
        if self.seen + len(pixels) > self.dies_at:
            raise Killed
        self.seen += len(pixels)
        return encode(pixels)


def extract(dataset, cache, **options):
    options = {
        "encode_images": encode,
        "key_parts": {"tokenizer": "t"},
        "resolution": SIZE,
        "code_shape": (2, 1),
        "vocab": 256,
        "views": Views("flip"),
        "batch_size": 4,
        "progress": False,
        "processes": Processes(patience=20),
        **options,
    }
    return extract_codes(open_imagenet(dataset), cache, **options)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(imagenet, "_ROWS_PER_CHUNK", 3)


# -- views -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(17, 17), (18, 18), (19, 19)])
def test_ten_crop_is_torchvisions(size):
    image = picture(1, *size)
    for view, expected in zip(ten_crop(image, 12), transforms.TenCrop(12)(image), strict=True):
        np.testing.assert_array_equal(view, expected)


def test_views_of_an_image():
    image = picture(1, 80, 60)
    flip = Views("flip").cut(image, 40)
    assert flip.shape == (2, 3, 40, 40) and -1 <= flip.min() < 0 < flip.max() <= 1
    assert torch.equal(flip[1], flip[0].flip(-1))
    views = Views("ten-crop", (1.1, 1.05))
    both = views.cut(image, 40)
    assert views.count == len(both) == 20
    for i, crop_range in enumerate(views.crop_ranges):
        part = both[10 * i : 10 * i + 10]
        assert torch.equal(part, Views("ten-crop", (crop_range,)).cut(image, 40))
        # A left corner of the mirror image is a mirrored right corner.
        assert torch.equal(part[5:7], part[[1, 0]].flip(-1))
        assert len({view.numpy().tobytes() for view in part}) == 10
    with pytest.raises(ValueError, match="unknown views 'five'"):
        Views("five")
    with pytest.raises(ValueError, match=r"crop_ranges=\(0\.9,\)"):
        Views("ten-crop", (0.9,))


def test_crop_ranges_are_llamagens():
    """int(size * range) pixels: 281 and 268 of 256."""
    image = picture(1, 600, 600)
    for crop_range, side in ((1.1, 281), (1.05, 268)):
        cut = Views("ten-crop", (crop_range,)).cut(image, 256)
        top_left, _, _, bottom_right = cut[:4]
        overlap = 2 * 256 - side
        assert torch.equal(top_left[:, -overlap:, -overlap:], bottom_right[:, :overlap, :overlap])


# -- the folder ------------------------------------------------------------------------------------
def test_labels_are_positions_of_sorted_classes(dataset, tmp_path):
    found = open_imagenet(dataset)
    assert found.classes == ["n01", "n02", "n03"]
    assert found.labels == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert open_imagenet(dataset / "train").files == found.files
    before = hash_files(found.contents(), tmp_path)
    dataset.rename(tmp_path / "moved")
    moved = open_imagenet(tmp_path / "moved")
    assert hash_files(moved.contents(), tmp_path) == before
    picture(3).save(moved.files[0])  # of the same name, and perhaps the same size
    assert hash_files(moved.contents(), tmp_path) != before


def test_a_class_may_be_named_as_a_split(dataset):
    """Case 13: train/ is a split if it holds the classes, or else a class among others."""
    (dataset / "train" / "train").mkdir()
    assert open_imagenet(dataset / "train").classes == ["n01", "n02", "n03", "train"]


def test_what_is_passed_over_is_named(dataset, caplog):
    """Cases 13, 18: broken links and hidden images in the folders of classes."""
    files = open_imagenet(dataset).files
    assert "left out" not in caplog.text
    (dataset / "train" / "n01" / "z.png").symlink_to("/gone")
    picture(1).save(dataset / "train" / "n02" / ".a.png")
    assert open_imagenet(dataset).files == files
    assert "2 left out (n01/z.png: broken link, n02/.a.png: hidden file)" in caplog.text


def test_other_folders_are_refused(tmp_path, caplog):
    with pytest.raises(
        ValueError, match=r"gone is no folder; give the one that holds val/<class>/"
    ):
        open_imagenet(tmp_path / "gone", "val")
    with pytest.raises(ValueError, match="has no sub-folders"):
        open_imagenet(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match="1 sub-folders, and no images"):
        open_imagenet(tmp_path)
    (tmp_path / "n02").mkdir()
    picture(0).save(tmp_path / "n02" / "a.png")
    assert open_imagenet(tmp_path).labels == [1]
    assert "1 of 2 classes have no images (n01, ...)" in caplog.text
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"holds 1 images \(loose\.png, \.\.\.\)"):
        open_imagenet(tmp_path)


# -- extraction ------------------------------------------------------------------------------------
def test_content(dataset, tmp_path):
    folder = extract(dataset, tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {
        "codes.npy",
        "labels.npy",
        "skipped.jsonl",
        "manifest.json",
    }
    codes = np.load(folder / "codes.npy")
    assert codes.shape == (9, 2, 2, 1) and codes.dtype == np.uint16
    array, images = CodeArray(folder), open_imagenet(dataset)
    usable = [0, 1, 2, 3, 4, 6, 7, 8]
    assert len(array) == 8 and array.views == 2
    assert array.labels(torch.arange(8)).tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    for row, index in enumerate(usable):
        views = Views("flip").cut(Image.open(images.files[index]), SIZE)
        expected = encode(views)
        assert torch.equal(array.codes([row, row], [0, 1]), expected)
        assert torch.equal(array.codes(torch.tensor([row]), torch.tensor([3])), expected[1:])
    assert (codes[5] == 0).all()
    (line,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert (line["index"], line["key"], line["reason"]) == (5, "n02/1.png", "corrupt")
    manifest = array.manifest
    assert (manifest["usable"], manifest["skipped"], manifest["key"]["classes"]) == (8, 1, 3)


def test_large_vocabularies_and_several_sub_tokens(dataset, tmp_path):
    def two(pixels):
        return encode(pixels).repeat(1, 1, 2) + 2**16

    folder = extract(dataset, tmp_path, encode_images=two, code_shape=(2, 2), vocab=2**18)
    assert np.load(folder / "codes.npy").dtype == np.int32
    assert CodeArray(folder).codes([0], [0]).shape == (1, 2, 2)
    assert CodeArray(folder).codes([0], [0]).min() >= 2**16


@pytest.mark.parametrize("change", [{"views": Views("ten-crop", (1.1,))}, {"resolution": 6}])
def test_the_folder_follows_what_the_content_depends_on(dataset, tmp_path, change):
    assert extract(dataset, tmp_path) != extract(dataset, tmp_path, **change)
    assert extract(dataset, tmp_path) != extract(dataset, tmp_path, key_parts={"tokenizer": "u"})


@pytest.mark.parametrize("dies_at", [0, 4, 6, 8, 14, 17])
def test_resume_after_a_kill_while_encoding(dataset, tmp_path, dies_at):
    whole = folder_content(extract(dataset, tmp_path / "whole"))
    with pytest.raises(Killed):
        extract(dataset, tmp_path / "cache", encode_images=Encoder(dies_at))
    (folder,) = (tmp_path / "cache").iterdir()
    with pytest.raises(ValueError, match="holds no finished array"):
        CodeArray(folder)
    complete = len(list(folder.rglob("*-*.json")))
    assert complete == dies_at // 6, "six views of three images are a chunk"
    rest = Encoder()
    assert extract(dataset, tmp_path / "cache", encode_images=rest) == folder
    assert rest.seen == 18 - 6 * complete
    assert folder_content(folder) == whole
    again = Encoder()
    extract(dataset, tmp_path / "cache", encode_images=again)
    assert again.seen == 0


@pytest.mark.parametrize("moment", ["creating", "data", "marker", "labels", "manifest", "sealing"])
def test_resume_after_a_kill_while_writing(dataset, tmp_path, monkeypatch, moment):
    whole = folder_content(extract(dataset, tmp_path / "whole"))
    calls = dict.fromkeys(("fsync", "replace", "rmtree"), 0)

    def counting(name, real, dies_at):
        def call(*arguments):
            calls[name] += 1
            if calls[name] == dies_at:
                raise Killed
            return real(*arguments)

        return call

    # Each of the three chunks is one fsync of the data, then one fsync and one replacement for the
    # marker. The array itself is created before them, and skipped.jsonl, labels and manifest
    # follow.
    with monkeypatch.context() as patch:
        if moment == "data":
            patch.setattr(array_file.os, "fsync", counting("fsync", os.fsync, 4))
        elif moment == "sealing":
            patch.setattr(code_array, "remove_markers", counting("rmtree", None, 1))
        else:
            dies_at = {"creating": 1, "marker": 3, "labels": 6, "manifest": 7}[moment]
            patch.setattr(os, "replace", counting("replace", os.replace, dies_at))
        with pytest.raises(Killed):
            extract(dataset, tmp_path / "cache")
    rest = Encoder()
    folder = extract(dataset, tmp_path / "cache", encode_images=rest)
    assert rest.seen == {"creating": 18, "data": 12, "marker": 12}.get(moment, 0)
    found = folder_content(folder)
    assert found == whole


def test_two_processes_give_what_one_gives(dataset, tmp_path):
    whole = folder_content(extract(dataset, tmp_path / "one"))
    encoders = [Encoder(), Encoder()]

    def work(rank):
        options = {"processes": Processes(rank, 2, patience=20), "encode_images": encoders[rank]}
        extract(dataset, tmp_path / "two", **options)

    in_threads(work, (1, 0))
    (folder,) = (tmp_path / "two").iterdir()
    assert folder_content(folder) == whole
    assert [encoder.seen for encoder in encoders] == [12, 6]


def test_work_of_two_processes_is_finished_by_one(dataset, tmp_path):
    whole = folder_content(extract(dataset, tmp_path / "one"))
    with pytest.raises(TimeoutError, match="Start again to go on"):
        extract(dataset, tmp_path / "two", processes=Processes(0, 2, patience=0.1))
    rest = Encoder()
    folder = extract(dataset, tmp_path / "two", encode_images=rest)
    assert rest.seen == 6, "the chunk of the process that was not there"
    assert folder_content(folder) == whole


def test_a_process_alone_notices_that_rank_0_is_missing(dataset, tmp_path):
    with pytest.raises(TimeoutError):
        extract(dataset, tmp_path, processes=Processes(1, 2, patience=0.1))
    extract(dataset, tmp_path / "other")
    (folder,) = (tmp_path / "other").iterdir()
    (folder / "manifest.json").unlink()  # rank 0 stopped before it
    with pytest.raises(TimeoutError, match="without progress"):
        extract(dataset, tmp_path / "other", processes=Processes(1, 2, patience=0.3))


def test_the_batch_size_does_not_matter(dataset, tmp_path):
    first = folder_content(extract(dataset, tmp_path / "a", batch_size=1))
    assert first == folder_content(extract(dataset, tmp_path / "b", batch_size=100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 7}, "do not fit a vocabulary of 7"),
        ({"code_shape": (3, 1)}, r"have the shape \[3, 2, 2, 1\], expected \[3, 2, 3, 1\]"),
        ({"encode_images": lambda pixels: encode(pixels)[:1]}, "gave codes of the shape"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_codes(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(dataset, tmp_path / "cache", **options)


def test_no_usable_image(tmp_path):
    (tmp_path / "data" / "n01").mkdir(parents=True)
    (tmp_path / "data" / "n01" / "a.png").touch()
    with pytest.raises(ValueError, match=r"none of the 1 images can be used; see .*skipped\.jsonl"):
        extract(tmp_path / "data", tmp_path / "cache")


def test_patience_begins_anew_with_every_chunk(tmp_path, monkeypatch):
    rest = tmp_path / "sign", ALONE
    array = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 1, *rest)
    waiting = ArrayFile(
        tmp_path / "a.npy", (4, 2), np.uint8, 1, tmp_path / "sign", Processes(1, 2, patience=10)
    )
    now, todo = 0.0, array.missing()

    def sleep(seconds):
        """Eight of the ten seconds pass, in which another process does a chunk or, at last,
        finishes.
        """
        nonlocal now
        now += 8
        if todo:
            array.write(todo[0], np.ones((1, 2), np.uint8))
            todo.pop(0)
        elif finishes:
            (tmp_path / "sign").touch()

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    finishes = False
    with pytest.raises(TimeoutError, match=r"waited 10 s for .*sign without progress"):
        waiting.wait_for_sign()
    assert todo == [] and now == 8 * 6
    finishes = True
    waiting.wait_for_sign()


def test_an_array_of_another_shape_is_not_continued(tmp_path):
    rest = tmp_path / "sign", ALONE
    ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, *rest)
    with pytest.raises(ValueError, match=r"holds uint8 \[4, 2\], needed is uint8 \[4, 3\]"):
        ArrayFile(tmp_path / "a.npy", (4, 3), np.uint8, 2, *rest)


def test_chunks_of_another_size_do_not_count_as_done(tmp_path):
    rest = tmp_path / "sign", ALONE
    array = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, *rest)
    array.write(range(2), np.ones((2, 2), np.uint8))
    assert array.missing() == [range(2, 4)]
    other = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 3, *rest)
    assert other.missing() == [range(3), range(3, 4)]


def test_nothing_is_missing_once_the_sign_is_there(tmp_path):
    """A process that comes late, when another has finished and removed the markers or the file
    itself.
    """
    (tmp_path / "sign").touch()
    late = Processes(1, 2, patience=0.1)
    assert (
        ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, tmp_path / "sign", late).missing() == []
    )

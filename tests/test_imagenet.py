"""ImageNet: views of an image, folders of classes, and the store of their codes."""

import json

import pytest
import torch
from helpers import Killed, folder_content
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from t2i.data.content import hash_files
from t2i.data.encoding import Encoding, build_store
from t2i.data.images import ImageRules, Views, to_pixels
from t2i.data.sources.classes import LabelledFolder
from t2i.data.store import CodeStore
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
    """Codes [B, 2, 1]: red of the first pixel and green of the last, inverted."""
    levels = torch.stack([pixels[:, 0, 0, 0], pixels[:, 1, -1, -1]], 1)
    return ((1 - levels) * 127.5).round().long()[..., None]


class ViewEncoder:
    """Encodes and counts views; raises Killed instead of exceeding `dies_at`."""

    def __init__(self, dies_at=10**9):
        self.seen, self.dies_at = 0, dies_at

    def __call__(self, pixels):
        if self.seen + len(pixels) > self.dies_at:
            raise Killed
        self.seen += len(pixels)
        return encode(pixels)


def extract(dataset, folder, views="flip", expected_key=None, **changes):
    rules = ImageRules(SIZE, Views(views), small="upscale")
    defaults = {"images": encode, "rules": rules, "batch_size": 4, "shard_size": 3}
    encoding = Encoding(**(defaults | changes))
    return build_store(LabelledFolder(dataset), folder, encoding, expected_key=expected_key)


# -- views -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [17, 18, 19])
def test_ten_crop_equals_torchvisions(size):
    image = picture(1, size, size)
    views = Views("ten-crop", (size / 12,)).cut(image, 12)
    expected = [to_pixels(view) for view in transforms.TenCrop(12)(image)]
    assert torch.equal(views, torch.stack(expected))


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
        # A left corner of the mirrored image is a mirrored right corner.
        assert torch.equal(part[5:7], part[[1, 0]].flip(-1))
        assert len({view.numpy().tobytes() for view in part}) == 10
    with pytest.raises(ValueError, match=r"crop_ranges=\(0\.9,\)"):
        Views("ten-crop", (0.9,))


def test_crop_ranges_are_llamagens():
    """A crop range is int(size * range) pixels wide: 281 and 268 for a size of 256."""
    image = picture(1, 600, 600)
    for crop_range, side in ((1.1, 281), (1.05, 268)):
        cut = Views("ten-crop", (crop_range,)).cut(image, 256)
        top_left, _, _, bottom_right = cut[:4]
        overlap = 2 * 256 - side
        assert torch.equal(top_left[:, -overlap:, -overlap:], bottom_right[:, :overlap, :overlap])


# -- the folder ------------------------------------------------------------------------------------
def test_labels_are_positions_of_sorted_classes(dataset, tmp_path):
    found = LabelledFolder(dataset)
    assert found.classes == ["n01", "n02", "n03"]
    assert found.labels == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert LabelledFolder(dataset / "train").paths == found.paths
    before = hash_files(found.files(), tmp_path)
    dataset.rename(tmp_path / "moved")
    moved = LabelledFolder(tmp_path / "moved")
    assert hash_files(moved.files(), tmp_path) == before
    picture(3).save(moved.paths[0])  # the same name, and perhaps the same size
    assert hash_files(moved.files(), tmp_path) != before


def test_a_class_may_be_named_as_a_split(dataset):
    """Case 13: train/ is the split if it holds the classes, otherwise one of the classes."""
    (dataset / "train" / "train").mkdir()
    assert LabelledFolder(dataset / "train").classes == ["n01", "n02", "n03", "train"]


def test_files_that_are_left_out_are_reported(dataset, tmp_path):
    """Cases 13, 18: broken links, hidden images and unknown formats in the folders of classes."""
    found = LabelledFolder(dataset)
    assert found.left_out == []
    (dataset / "train" / "n01" / "z.png").symlink_to("/gone")
    picture(1).save(dataset / "train" / "n02" / ".a.png")
    assert LabelledFolder(dataset).paths == found.paths
    picture(2).save(dataset / "train" / "n03" / "z.jpe", "JPEG")
    assert len(LabelledFolder(dataset).paths) == len(found.paths) + 1
    (dataset / "train" / "n02" / "b.heic").touch()
    left_out = [("n01/z.png", "broken link"), ("n02/.a.png", "hidden file")]
    left_out.append(("n02/b.heic", "format that is not read"))
    for name in ("17", "17.jpg_large", "notes.txt"):  # as downloads are named
        (dataset / "train" / "n03" / name).touch()
    left_out += [(f"n03/{name}", "no name of an image") for name in ("17", "17.jpg_large")]
    assert LabelledFolder(dataset).left_out == left_out
    report = CodeStore(extract(dataset, tmp_path / "cache")).manifest["report"]
    assert "1 broken link (n01/z.png)" in report["lines"][0]


def test_empty_classes_are_part_of_the_data(dataset, tmp_path):
    """Renaming an empty class changes the labels of all classes after it, although no file changes:
    the codes must be encoded again.
    """
    (dataset / "train" / "n04").mkdir()
    before = extract(dataset, tmp_path / "cache")
    (dataset / "train" / "n04").rename(dataset / "train" / "n00")
    after = extract(dataset, tmp_path / "cache")
    assert [CodeStore(folder).condition(0) for folder in (before, after)] == [0, 1]
    with pytest.raises(ValueError, match=r"empty_classes: \['n04'\] -> \['n00'\]"):
        extract(dataset, tmp_path / "cache", expected_key=before.name)


def test_hidden_folders_are_not_classes(dataset):
    """__MACOSX, found in a Mac's zip files, sorts before lower-case classes and would shift their
    labels.
    """
    found = LabelledFolder(dataset)
    for name in ("__MACOSX", ".thumbs"):
        (dataset / "train" / name).mkdir()
        picture(1).save(dataset / "train" / name / "0.png")
    again = LabelledFolder(dataset)
    assert (again.classes, again.paths, again.identity) == (
        found.classes,
        found.paths,
        found.identity,
    )
    left_out = [(".thumbs/", "hidden folder"), ("__MACOSX/", "hidden folder")]
    assert again.left_out == left_out


@pytest.mark.parametrize(
    ("names", "remark"),
    [
        (("0", "1", "2"), None),
        (("00", "01", "10", "11"), "folder 10 is class 2: "),
        (("0", "1", "10", "2"), "folder 10 is class 2: "),
        (("a", "5"), None),
    ],
)
def test_folders_with_other_numbers_than_their_classes_are_reported(tmp_path, names, remark):
    """Used to go unnoticed: of folders named 0 to 999, as scripts write them, 10 is class 2."""
    for name in names:
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "a.png")
    found = LabelledFolder(tmp_path).remarks
    assert [text.startswith(remark) for text in found] == [True] if remark else found == []


def test_folders_without_images_by_class_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"gone is not a folder; give the one that holds val/<class>/"
    ):
        LabelledFolder(tmp_path / "gone", "val")
    with pytest.raises(ValueError, match="has no sub-folders"):
        LabelledFolder(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match="1 sub-folders, but no images"):
        LabelledFolder(tmp_path)
    (tmp_path / "n02").mkdir()
    picture(0).save(tmp_path / "n02" / "a.png")
    found = LabelledFolder(tmp_path)
    assert found.labels == [1]
    assert found.remarks == ["1 of 2 classes have no images (n01, ...)"]
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"holds 1 images \(loose\.png, \.\.\.\)"):
        LabelledFolder(tmp_path)


# -- codes -----------------------------------------------------------------------------------------
def test_the_store_holds_codes_labels_and_names(dataset, tmp_path):
    folder = extract(dataset, tmp_path / "cache")
    store, images = CodeStore(folder), LabelledFolder(dataset)
    usable = [0, 1, 2, 3, 4, 6, 7, 8]
    assert len(store) == 8 and store.views == 2 and store.same_images() is None
    assert [store.condition(row) for row in range(8)] == [0, 0, 0, 0, 1, 2, 2, 2]
    for row, index in enumerate(usable):
        views = Views("flip").cut(Image.open(images.paths[index]), SIZE)
        expected = encode(views)
        assert torch.equal(store.codes([row, row], [0, 1]), expected)
        assert torch.equal(store.codes(torch.tensor([row]), torch.tensor([3])), expected[1:])
        assert torch.equal(store.codes([row]), expected[:1])
        assert store.name(row) == str(images.paths[index].relative_to(dataset / "train"))
    (line,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert (line["index"], line["key"], line["reason"]) == (5, "n02/1.png", "corrupt")
    manifest = store.manifest
    assert (manifest["report"]["usable"], manifest["report"]["skipped"]) == (8, {"corrupt": 1})
    assert manifest["key"]["source"]["classes"] == 3


def test_large_vocabularies_and_several_sub_tokens(dataset, tmp_path):
    folder = extract(dataset, tmp_path, images=lambda p: encode(p).repeat(1, 1, 2) + 2**16)
    assert load_file(folder / "shard_00000.safetensors")["codes"].dtype == torch.int32
    assert CodeStore(folder).codes([0]).shape == (1, 2, 2)
    assert CodeStore(folder).codes([0]).min() >= 2**16


def test_other_views_are_stored_in_another_folder(dataset, tmp_path):
    assert extract(dataset, tmp_path) != extract(dataset, tmp_path, "ten-crop")


@pytest.mark.parametrize("dies_at", [0, 6, 8, 15])
def test_resume_after_a_kill_while_encoding(dataset, tmp_path, dies_at):
    whole = folder_content(extract(dataset, tmp_path / "whole"))
    with pytest.raises(Killed):
        extract(dataset, tmp_path / "cache", images=ViewEncoder(dies_at))
    (folder,) = (tmp_path / "cache").iterdir()
    complete = len(list(folder.glob("*.safetensors")))
    assert complete == (dies_at >= 6) + (dies_at >= 10), "two views of three images are a shard"
    rest = ViewEncoder()
    assert extract(dataset, tmp_path / "cache", images=rest) == folder
    assert rest.seen == [16, 10, 6][complete], "number 5 is broken"
    assert folder_content(folder) == whole


def test_the_batch_size_does_not_matter(dataset, tmp_path):
    first = folder_content(extract(dataset, tmp_path / "a", batch_size=1))
    assert first == folder_content(extract(dataset, tmp_path / "b", batch_size=100))
